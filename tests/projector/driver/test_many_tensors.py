"""What many tensors cost: five times as many take five times as many steps of the program, and no more."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from daemon.versions.weight_files import plan_weights
from projector.errors import BadSchema, Reason
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader
from projector.lora.config import LoraConfig
from projector.lora.expert import LoraExpert
from projector.matching.matching import matched
from projector.names.naming import SAME, Naming

FEW, MANY, MOST = 200, 1000, 10_000
OURS = str(Path(__file__).parents[3])
Tensors = dict[str, Tensor]
Open = Callable[..., Checkpoint]


def steps_of(work: Callable[[], object]) -> int:
    """How many lines of this project's code are run, each turn of a loop or of a comprehension counting as one."""
    count = 0

    def line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return line

    def call(frame: FrameType, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(OURS) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def modules(count: int) -> list[str]:
    """As a mixture of experts has them."""
    return [f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj" for i in range(count)]


def model(count: int, shape: tuple[int, ...] = (2, 3), head: str = "") -> Tensors:
    return {f"{head}{name}.weight": torch.full(shape, float(i)) for i, name in enumerate(modules(count))}


def factors(names: list[str], a: str = "lora_A.weight", b: str = "lora_B.weight", turned: bool = False) -> Tensors:
    """Of rank 1; turned: those of an embedding, whose weight is the other way round."""
    m, n = (3, 2) if turned else (2, 3)
    found = {f"base_model.model.{name}.{a}": torch.full((1, n), float(i)) for i, name in enumerate(names)}
    return found | {f"base_model.model.{name}.{b}": torch.full((m, 1), float(i + 1)) for i, name in enumerate(names)}


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    held: list[int] = []

    def reader(tensors: Tensors) -> TensorReader:
        path = tmp_path / f"{len(held)}.safetensors"
        save_file({name: x.clone() for name, x in tensors.items()}, path)
        held.append(os.open(path, os.O_RDONLY))
        return TensorReader(held[-1])

    def checkpoint(*files: Tensors, **sidecars: Tensors) -> Checkpoint:
        return Checkpoint(map(reader, files), {kind: reader(tensors) for kind, tensors in sidecars.items()})

    yield checkpoint
    for fd in held:
        os.close(fd)


def adapter(opened: Open, tensors: Tensors, base: Tensors, config: Mapping[str, Any] = {}) -> Callable[[], object]:
    files, over = [place.file for place in list(opened(tensors)._places.values())[:1]], opened(base)

    def work() -> None:
        expert = LoraExpert(files, {}, LoraConfig(r=1, lora_alpha=1, **config), over)
        for name, spec in over.schema.items():
            fetched = expert.fetch(spec, None)
            expert.factors(spec, fetched)
            assert expert.touches(name) == bool(fetched)

    return work


def refused(reason: Reason, work: Callable[[], object]) -> Callable[[], object]:
    def tried() -> None:
        with pytest.raises(BadSchema) as caught:
            work()
        assert caught.value.reason is reason and len(str(caught.value)) + len(caught.value.hint) < 2000

    return tried


def in_shards(opened: Open, n: int) -> Callable[[], object]:
    expert = list(model(n, head="module.").items())
    shards = [dict(expert[i::10]) for i in range(10)]
    base, sidecar = opened(model(n)), model(n, head="module.")
    return lambda: matched(base, opened(*shards, fisher=sidecar), Naming({"module.": ""}))


def held_against(opened: Open, n: int, expert: Tensors, reason: Reason) -> Callable[[], object]:
    base, other = opened(model(n)), opened(expert)
    return refused(reason, lambda: matched(base, other, SAME))


def tied_vectors(opened: Open, n: int) -> Callable[[], object]:
    """Each saved a second time, under a name that the base has not."""
    values = {f"{name}.bias": torch.tensor([i + 2.0, 1.0]) for i, name in enumerate(modules(n))}
    again = {f"base_model.model.again.{name}": x for name, x in values.items()}
    return adapter(opened, {f"base_model.model.{name}": x for name, x in values.items()} | again, values)


def tied_embeddings(opened: Open, n: int) -> Callable[[], object]:
    names = modules(n)
    ours = factors(names, "lora_embedding_A", "lora_embedding_B", turned=True)
    again = {}
    for name in names:
        a, b = (ours[f"base_model.model.{name}.lora_embedding_{part}"] for part in "AB")
        again |= {f"base_model.model.again.{name}.lora_A.weight": b.T.contiguous()}
        again |= {f"base_model.model.again.{name}.lora_B.weight": a.T.contiguous()}
    return adapter(opened, ours | again, {f"{name}.weight": torch.zeros(2, 3) for name in names})


CASES: dict[str, Callable[[Open, int], Callable[[], object]]] = {
    "its tied weights are looked for": lambda opened, n: opened(model(n)).twins,
    "an expert in shards, with prefixes and a sidecar": in_shards,
    "an adapter of every matrix": lambda o, n: adapter(o, factors(modules(n)), model(n)),
    "an adapter with a rank for each": lambda o, n: adapter(
        o, factors(modules(n)), model(n), {"rank_pattern": dict.fromkeys(modules(n)[:4000], 1)}
    ),
    "an adapter of other modules": lambda o, n: refused(
        Reason.UNEXPECTED_TENSOR,
        adapter(o, factors([f"other.{name}" for name in modules(n)] + modules(1)), model(n)),
    ),
    "an adapter with biases saved twice": tied_vectors,
    "an adapter with embeddings tied": tied_embeddings,
    "other names": lambda o, n: held_against(
        o, n, {f"q.{i}.{name[::-1]}": x for i, (name, x) in enumerate(model(n).items())}, Reason.WRONG_BASE
    ),
    "half of the names": lambda o, n: held_against(
        o, n, dict(list(model(n).items())[: n // 2]) | model(n // 2, head="x."), Reason.MISSING_TENSOR
    ),
    "more names": lambda o, n: held_against(o, n, model(n) | model(n, (4, 5), "more."), Reason.UNEXPECTED_TENSOR),
    "files of ten tensors": lambda o, n: lambda: plan_weights(o(model(n)).schema.values(), 1500),
}


@pytest.mark.parametrize("count", [MANY, pytest.param(MOST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_the_work_grows_with_the_tensors_and_no_faster(opened: Open, case: str, count: int) -> None:
    few, many = (steps_of(CASES[case](opened, n)) for n in (FEW, count))
    assert 0 < many <= few * count / FEW * 1.1, (few, many)


def test_the_schema_is_made_once(opened: Open) -> None:
    checkpoint = opened(model(3))
    assert checkpoint.schema is checkpoint.schema
    assert [*checkpoint.under({"a": "model.layers.0.mlp.experts.1.up_proj.weight"}).schema] == ["a"]
