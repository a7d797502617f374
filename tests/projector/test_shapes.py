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
