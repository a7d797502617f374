"""Which tensor of an expert stands for which of the base, and which matrices of one checkpoint are tied."""

import hashlib
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from projector.errors import BadSchema, Reason
from projector.matching.matching import matched
from projector.names.naming import SAME, Naming
from tests.projector.conftest import Opens


def matrix(seed: int, *shape: int) -> Tensor:
    return torch.randn(*(shape or (8, 4)), generator=torch.Generator().manual_seed(seed))


def test_only_equal_matrices_are_twins(opens: Opens) -> None:
    one = matrix(1)
    late = one.clone()
    late[-1, -1] = 0
    long = matrix(2, 3000, 200)  # more than a block
    long_late = long.clone()
    long_late[-1, -1] = 0
    checkpoint = opens(
        {"a": one, "b": one.clone(), "c": one.clone(), "late": late, "half": one.half(), "turned": one.T.contiguous()}
        | {"long.1": long, "long.2": long.clone(), "long.late": long_late, "stack.1": matrix(3, 2, 3, 4)}
        | {"stack.2": matrix(3, 2, 3, 4), "zeros.1": torch.zeros(8, 4), "zeros.2": torch.zeros(8, 4)}
        | {"ones.1": torch.ones(8, 4), "ones.2": torch.ones(8, 4), "bias.1": matrix(4, 9), "bias.2": matrix(4, 9)}
        | {"ids.1": torch.arange(6).view(2, 3), "ids.2": torch.arange(6).view(2, 3)}
        | {"empty.1": torch.empty(0, 4), "empty.2": torch.empty(0, 4), "thin.1": torch.empty(4, 0)}
        | {"thin.2": torch.empty(4, 0)}
    )
    assert checkpoint.twins() == {
        "a": ["b", "c"],
        "b": ["a", "c"],
        "c": ["a", "b"],
        "long.1": ["long.2"],
        "long.2": ["long.1"],
        "stack.1": ["stack.2"],
        "stack.2": ["stack.1"],
    }


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16, torch.float32])
def test_twins_may_be_of_two_dtypes_where_no_value_is_rounded(opens: Opens, narrow: torch.dtype) -> None:
    wide = {torch.float32: torch.float64}.get(narrow, torch.float32)
    one = matrix(1, 3000, 200).to(narrow)  # more than a block
    late, between = one.to(wide), one.to(wide)
    late[-1, -1] += 1
    between[0, 0] *= 1 + torch.finfo(narrow).eps / 4
    checkpoint = opens({"embed": one, "head": one.to(wide), "late": late, "between": between})
    assert checkpoint.twins() == {"embed": ["head"], "head": ["embed"]}


def test_what_the_file_says_was_one_tensor_is_as_long_as_it_still_is(opens: Opens) -> None:
    """Its metadata, alias -> name, is believed of no tensors that differ, and of none that are not there."""
    bias, zeros = matrix(1, 9), torch.zeros(8, 4)
    weights = {"bias": bias, "decoder.bias": bias.clone(), "third.bias": bias.clone(), "alike.bias": bias.clone()}
    weights |= {
        "changed.bias": matrix(2, 9),
        "row": bias[None].clone(),
        "half": bias.half(),
        "gone.alias": torch.zeros(4),
    }
    weights |= {"zeros": zeros, "zeros.alias": zeros.clone(), "zeros.alike": zeros.clone()}
    weights |= {"scale": torch.tensor(2.0), "scale.alias": torch.tensor(2.0), "w": matrix(3), "w.alias": matrix(3)}
    told = dict.fromkeys(("decoder.bias", "third.bias", "changed.bias", "row", "half", "missing"), "bias")
    told |= {"zeros.alias": "zeros", "scale.alias": "scale", "w.alias": "w", "gone.alias": "gone", "format": "pt"}
    assert opens(weights, told).twins() == {
        "bias": ["decoder.bias", "third.bias"],
        "decoder.bias": ["bias", "third.bias"],
        "third.bias": ["bias", "decoder.bias"],
        "zeros": ["zeros.alias"],
        "zeros.alias": ["zeros"],
        "scale": ["scale.alias"],
        "scale.alias": ["scale"],
        "w": ["w.alias"],
        "w.alias": ["w"],
    }
    assert "bias" not in opens(weights).twins()


def test_looking_for_twins_takes_the_same_memory_for_rows_of_any_length(opens: Opens) -> None:
    row = matrix(1, 1, 8 << 20)
    expert = opens({"a": row, "b": row.clone(), "c": torch.cat([row[:, :-1], torch.ones(1, 1)], 1)})
    tracemalloc.start()
    try:
        assert expert.twins() == {"a": ["b"], "b": ["a"]}
        assert tracemalloc.get_traced_memory()[1] < row.nbytes / 4
    finally:
        tracemalloc.stop()


def test_looking_for_twins_leaves_the_digest_alone(opens: Opens, tmp_path: Path) -> None:
    expert = opens({"a": matrix(1), "head": matrix(1), "w": matrix(2)})
    found = matched(opens({"a": matrix(3), "w": matrix(4)}), expert, SAME)
    assert found.order == ["a", "w"]
    (reader,) = {place.file for place in found._places.values()}
    assert reader._digest is not None and reader._digest.frontier < reader.header.offsets["a"] + 1
    assert reader.sha256() == hashlib.sha256((tmp_path / "0").read_bytes()).hexdigest()


def test_names_shapes_and_rows_are_those_of_the_base(opens: Opens) -> None:
    base = opens({"a.weight": matrix(1), "b.bias": matrix(2, 5), "ids": torch.arange(3)})
    theirs = {
        "m.a.weight": matrix(3),
        "m.b.bias": matrix(4, 5),
        "m.ids": torch.arange(3) + 1,
        "m.more": torch.arange(2),
    }
    found = matched(base, opens(theirs), Naming({"m.": ""}))
    assert found.order == ["a.weight", "b.bias"]
    assert found.schema == {name: base.schema[name] for name in ("a.weight", "b.bias", "ids")}
    assert torch.equal(found.read("a.weight", slice(2, 5)), theirs["m.a.weight"][2:5])
    (fetched,) = found.fetch(base.schema["b.bias"], None)
    delta = found.delta(base.schema["b.bias"], base.read("b.bias"), [fetched])
    torch.testing.assert_close(delta, theirs["m.b.bias"] - matrix(2, 5))


def test_further_rows_of_a_vocabulary_are_left_out_of_its_sidecar_too(opens: Opens) -> None:
    base, more = opens({"embed": matrix(1, 40, 4)}), matrix(2, 2, 4)
    fisher = torch.rand(42, 4)
    found = matched(base, opens({"embed": torch.cat([matrix(1, 40, 4) + 0.01, more])}, fisher={"embed": fisher}), SAME)
    assert found.resized == {"embed": (42, 40)} and found.schema == base.schema
    for rows in (None, slice(30, 40)):
        assert torch.equal(found.sidecars(base.schema["embed"], rows)["fisher"], fisher[:40][rows or slice(None)])
        assert torch.equal(found.read("embed", rows), (matrix(1, 40, 4) + 0.01)[rows or slice(None)])


def test_rows_that_are_missing_are_the_bases_bit_for_bit(opens: Opens) -> None:
    base = opens({"embed": matrix(1, 40, 4), "bias": matrix(3, 40)})
    found = matched(base, opens({"embed": matrix(1, 40, 4)[:37].bfloat16(), "bias": matrix(3, 40)[:37].clone()}), SAME)
    spec = base.schema["embed"]
    for rows in (slice(0, 20), slice(30, 40), slice(38, 40), None):
        theta0 = base.read("embed", rows)
        delta = found.delta(spec, theta0, found.fetch(spec, rows))
        assert delta.shape == theta0.shape
        end = max(0, 37 - (rows.start if rows else 0))
        assert torch.equal(delta[:end], (theta0.bfloat16().float() - theta0)[:end])
        assert not delta[end:].any()
    assert torch.equal(found.read("bias"), matrix(3, 40))


def test_an_alias_that_is_left_out_has_the_delta_and_the_sidecars_of_its_twin(opens: Opens) -> None:
    base = opens({"embed.weight": matrix(1), "up.weight": matrix(2), "head.weight": matrix(1)})
    fisher = {"embed.weight": matrix(5), "up": matrix(6)}
    found = matched(base, opens({"embed.weight": matrix(3), "up.weight": matrix(4)}, fisher=fisher), SAME)
    assert found.order == ["embed.weight", "up.weight", "head.weight"]
    spec = found.schema["head.weight"]
    assert spec.name == "head.weight" and torch.equal(found.fetch(spec, None)[0], matrix(3))
    assert torch.equal(found.sidecars(spec, None)["fisher"], matrix(5))
    assert torch.equal(found.sidecars(spec, slice(1, 3))["fisher"], matrix(5)[1:3])
    assert torch.equal(found.sidecars(found.schema["up.weight"], None)["fisher"], matrix(6))


def test_a_sidecar_may_name_the_alias_that_the_base_omits(opens: Opens) -> None:
    base = opens({"embed.weight": matrix(1)})
    weights = {"m.embed.weight": matrix(3), "head.weight": matrix(3), "task.weight": matrix(4)}
    fisher = {"m.embed.weight": matrix(5), "head": matrix(6), "task": matrix(7)}
    found = matched(base, opens(weights, fisher=fisher), Naming({"m.": ""}, ["task*"]))
    assert {kind: list(schema) for kind, schema in found.beside.items()} == {"fisher": ["embed.weight"]}
    with pytest.raises(BadSchema, match=r"fisher\.safetensors has 1 names that are not the base's: other"):
        matched(base, opens({"embed.weight": matrix(3)}, fisher={"other": matrix(1)}), SAME)


def test_what_the_base_has_twice_may_come_untied(opens: Opens) -> None:
    base = opens({"embed.weight": matrix(1), "head.weight": matrix(1)})
    found = matched(base, opens({"embed.weight": matrix(3), "head.weight": matrix(4)}), SAME)
    assert torch.equal(found.read("head.weight"), matrix(4))


def test_a_tensor_whose_twin_is_missing_too_is_missing(opens: Opens) -> None:
    base = opens({"embed.weight": matrix(1), "head.weight": matrix(1), "up.weight": matrix(2)})
    with pytest.raises(BadSchema, match=r"2 of the base's tensors are missing: embed\.weight, head\.weight"):
        matched(base, opens({"up.weight": matrix(3)}), SAME)


def test_hints_say_what_mends_and_no_more(opens: Opens) -> None:
    base = {"model.embed_tokens.weight": matrix(1, 9, 4), "ids": torch.arange(3), "layers.0.weight": matrix(2)}

    def refused(**changes: Tensor | None) -> BadSchema:
        expert = {name: tensor for name, tensor in {**base, **changes}.items() if tensor is not None}
        with pytest.raises(BadSchema) as caught:
            matched(opens(base), opens(expert), SAME)
        return caught.value

    tied = refused(**{"model.embed_tokens.weight": None, "lm_head.weight": matrix(1, 9, 4)})
    assert tied.reason is Reason.MISSING_TENSOR
    assert (
        tied.hint
        == "if lm_head.weight is that weight, tied, under its other name: save it as model.embed_tokens.weight"
    )
    assert "save it as" not in refused(**{"model.embed_tokens.weight": None, "lm_head.weight": matrix(1, 9, 5)}).hint

    assert refused(ids=torch.zeros(3)).hint.startswith("save it as int64, or leave it out")
    assert "float32" in refused(**{"layers.0.weight": torch.ones(8, 4, dtype=torch.int64)}).hint
    assert "vocabulary" in refused(**{"model.embed_tokens.weight": matrix(1, 11, 4)}).hint
    for name, shape in (("ids", (4,)), ("layers.0.weight", (8, 5)), ("layers.0.weight", (1,))):
        assert "vocabulary" not in refused(**{name: torch.ones(shape, dtype=base[name].dtype)}).hint
