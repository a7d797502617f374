"""Shapes and dtypes of an expert's tensors held against the base's: what is refused, and what is said to do."""

from collections.abc import Mapping
from math import prod

import pytest
import torch

from projector.errors import BadSchema, Reason
from projector.spec import TensorSpec, check_schema

Shapes = Mapping[str, tuple[int, ...]]
BASE: Shapes = {
    "embed.weight": (24, 8),
    "up.weight": (16, 8),
    "down.weight": (8, 16),
    "norm.weight": (8,),
    "none": (0, 4),
}


def refused(shapes: Shapes) -> BadSchema:
    with pytest.raises(BadSchema) as raised:
        check_schema(schema(BASE), schema(shapes))
    return raised.value


def schema(shapes: Shapes) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, shape, torch.float32) for name, shape in shapes.items()}


def test_the_bases_own_shapes_are_taken_an_empty_one_too() -> None:
    check_schema(schema(BASE), schema(BASE))


@pytest.mark.parametrize("gone", [["embed.weight"], ["up.weight", "down.weight"], [*BASE]])
def test_what_zero_3_left_empty_is_said_to_be_so(gone: list[str]) -> None:
    error = refused({name: (0,) if name in gone else shape for name, shape in BASE.items()})
    counted = len([name for name in gone if name != "none"])
    assert error.reason is Reason.WRONG_SHAPE and str(error).startswith(f"{counted} tensors are empty: ")
    assert "zero_to_fp32.py" in error.hint and "without this file" in error.hint


def test_a_file_with_no_tensor_or_hardly_any_is_said_to_be_ungathered() -> None:
    assert (refused({}).reason, str(refused({}))) == (Reason.MISSING_TENSOR, "there is no tensor in it")
    assert "zero_to_fp32.py" in refused({}).hint
    assert "zero_to_fp32.py" in refused({"norm.weight": (8,)}).hint
    most = {name: shape for name, shape in BASE.items() if name != "norm.weight"}
    assert "zero_to_fp32.py" not in refused(most).hint


def test_a_flattened_matrix_is_said_to_be_one() -> None:
    whole = prod(BASE["up.weight"])
    for numel in (whole, whole // 2):
        error = refused({**BASE, "up.weight": (numel,)})
        assert str(error) == f"up.weight has shape [{numel}], the base [16, 8]"
        assert error.hint.startswith("it is flattened") and "zero_to_fp32.py" in error.hint


QUANTISED = {
    "GPTQ": ["up.qweight", "up.qzeros", "up.g_idx"],
    "bitsandbytes": [
        "up.weight.absmax",
        "up.weight.nested_quant_map",
        "up.weight.quant_state.bitsandbytes__nf4",
        "up.SCB",
    ],
    "compressed-tensors": ["up.weight_packed", "up.weight_zero_point"],
    "NVFP4": ["up.weight_scale_2", "up.input_global_scale"],
    "FineGrainedFP8Config": ["up.weight_scale_inv", "up.input_scale", "attn.k_scale"],
    "Mxfp4Config": ["experts.gate_up_proj_blocks"],
    "HQQ": ["up.W_q"],
    "torchao": ["up._weight_qdata"],
}


@pytest.mark.parametrize("scheme", QUANTISED)
def test_quantised_weights_are_called_by_their_scheme(scheme: str) -> None:
    for name in QUANTISED[scheme]:
        error = refused({**{n: s for n, s in BASE.items() if n != "up.weight"}, name: (3,)})
        assert error.reason is Reason.UNSUPPORTED_DTYPE and name in str(error)
        assert scheme in str(error) + error.hint


def test_the_scheme_that_can_be_widened_is_told_first() -> None:
    error = refused({**BASE, "experts.down_proj_scales": (2,), "experts.down_proj_blocks": (2,)})
    assert "(MXFP4)" in str(error) and "dequantize=True" in error.hint


def test_a_mixtures_layout_is_told_from_names_that_are_missing() -> None:
    fused = {"layers.0.mlp.experts.gate_up_proj": (2, 8, 4), "layers.0.mlp.experts.down_proj": (2, 4, 4)}
    single = {f"layers.0.mlp.experts.{n}.{part}_proj.weight": (4, 4) for n in (0, 1) for part in ("gate", "up", "down")}
    for ours, theirs, told in ((fused, single, "are fused: with"), (single, fused, "stand one by one: with")):
        with pytest.raises(BadSchema) as raised:
            check_schema(schema({**BASE, **ours}), schema({**BASE, **theirs}))
        assert raised.value.reason is Reason.MISSING_TENSOR and told in raised.value.hint


def test_what_does_not_float_in_the_base_must_not_float() -> None:
    counts = {"steps": TensorSpec("steps", (3,), torch.int64)}
    with pytest.raises(BadSchema, match="steps is float32, the base int64") as raised:
        check_schema(schema(BASE) | counts, schema({**BASE, "steps": (3,)}))
    assert raised.value.reason is Reason.UNSUPPORTED_DTYPE and "leave it out" in raised.value.hint
