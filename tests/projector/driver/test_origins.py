"""A head whose task vector is what was trained since another version, beside heads that go from the base."""

import os
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from projector.driver.fold import Driver
from projector.driver.head import HeadFold
from projector.driver.steps import Step, fold_bytes, state_specs
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.laws.trial import Tensors, merge, stream
from projector.method import Contribution, Method, Totals
from projector.methods import make
from projector.spec import TensorSpec
from tests.oracles import order as oracles_order
from tests.oracles import rules as oracles
from tests.oracles import spectral, trim

Weights = Mapping[str, Tensor]


def moved(base: Tensors, experts: Sequence[Tensors], origins: Sequence[Tensors]) -> list[dict[str, Tensor]]:
    """theta_0 + theta - origin in float64: the experts that would have the same task vectors, had they begun at the
    base."""
    return [
        {name: base[name].double() + tensor.double() - origin[name].double() for name, tensor in expert.items()}
        for expert, origin in zip(experts, origins, strict=True)
    ]


def drifting(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensors, list[Tensors], list[Tensors]]:
    """A base, the versions that trainers started from, each further away, and what they made of them."""
    base, steps = stream(2 * count)
    base = {name: tensor.to(dtype) for name, tensor in base.items()}
    origins, experts = [], []
    for n in range(count):
        away, trained = steps[2 * n], steps[2 * n + 1]
        origins.append({name: (x + n * (away[name] - x)).to(dtype) for name, x in base.items()})
        experts.append({name: (x + trained[name] - base[name]).to(dtype) for name, x in origins[-1].items()})
    return base, experts, origins


def onto(base: Tensors, vector: Weights) -> dict[str, Tensor]:
    return {name: base[name].double() + tensor for name, tensor in vector.items()}


ORACLES: Mapping[str, Callable[[Tensors, Sequence[Weights]], Weights]] = {
    "mean": oracles.mean,
    "ema": oracles.ema,
    "opcm": oracles.opcm,
    "ties": lambda base, experts: onto(base, trim.ties(base, experts, [1.0] * len(experts))),
    "iso_c": lambda base, experts: onto(base, spectral.iso_c(base, experts)),
    "slerp": lambda base, experts: onto(base, oracles_order.slerp(base, experts)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ORACLES)
def test_it_is_the_merge_of_what_was_trained_since(name: str, dtype: torch.dtype) -> None:
    base, experts, origins = drifting(4, dtype)
    truth = ORACLES[name](base, moved(base, experts, origins))
    weights, _, _ = merge(make(name), base, experts, origins=origins)
    for key, tensor in weights.items():
        eps = torch.finfo(dtype).eps
        assert torch.allclose(tensor.double(), truth[key].double(), rtol=2 * eps, atol=2e-6), key
    whole = ORACLES[name](base, experts)
    apart = oracles.norm({key: truth[key].double() - whole[key].double() for key in base})
    assert apart > 0.1, "the oracle would not tell the two apart"


@pytest.mark.parametrize("name", ["mean", "task_arithmetic"])
def test_from_the_base_itself_it_is_bit_for_bit_the_same(name: str) -> None:
    base, experts = stream(3)
    plain, since = merge(make(name), base, experts), merge(make(name), base, experts, origins=[base] * 3)
    assert plain[2] == since[2] and all(torch.equal(since[0][key], tensor) for key, tensor in plain[0].items())


def checkpoint(folder: "Files", tensors: Tensors) -> Checkpoint:
    return Checkpoint([folder.written(tensors)])


class Files:
    """Files in memory, as the driver wants them."""

    def new(self) -> int:
        return os.memfd_create("test")

    def written(self, tensors: Tensors) -> TensorReader:
        fd = self.new()
        writer = TensorWriter(fd, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], {})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return TensorReader(fd)


def folded(heads: Sequence[tuple[Method, bool]], base: Tensors, expert: Checkpoint, origin: Tensors) -> list[Weights]:
    """The states of heads that take one expert together, those with True relative to `origin`; in small blocks."""
    files = Files()
    ours, since = checkpoint(files, base), checkpoint(files, origin)
    fds = [files.new() for _ in heads]
    folds = [
        HeadFold(
            method,
            Totals(),
            Contribution(1),
            None,
            TensorWriter(fd, state_specs(method, ours.schema), {}),
            origin=since if relative else None,
        )
        for fd, (method, relative) in zip(fds, heads, strict=True)
    ]
    Driver(block_bytes=64).fold(ours, expert, folds)
    readers = [TensorReader(fd) for fd in fds]
    return [{name: reader.read(name) for name in reader.specs} for reader in readers]


def test_beside_it_a_head_from_the_base_keeps_its_bits() -> None:
    base, (expert,), _ = drifting(1)
    origin = {name: tensor + 0.25 for name, tensor in base.items()}
    files = Files()
    alone = folded([(make("mean"), False)], base, checkpoint(files, expert), origin)
    both = folded([(make("mean"), True), (make("mean"), False)], base, checkpoint(files, expert), origin)
    for key, tensor in alone[0].items():
        assert torch.equal(both[1][key], tensor), key
        name = key.partition("/")[2]
        assert torch.equal(both[0][key], expert[name] - origin[name]), key


def test_what_an_expert_has_not_itself_nobody_trained() -> None:
    """Tensors that it lacks, and rows of a vocabulary that ends earlier, are the base's: not the way back to it."""
    base = {"emb.weight": torch.ones(40, 3), "head.weight": torch.ones(4, 3), "scale": torch.tensor(1.0)}
    origin = {name: tensor + 0.5 for name, tensor in base.items()}
    files = Files()
    ours = checkpoint(files, base)
    theirs = checkpoint(files, {"emb.weight": torch.full((30, 3), 2.0)})
    names = {"emb.weight": "emb.weight"}
    expert = theirs.under(names, resized=["emb.weight"], lent=["head.weight", "scale"], base=ours)
    (state,) = folded([(make("mean"), True)], base, expert, origin)
    assert state["S/emb.weight"][:30].unique().tolist() == [0.5]
    assert not state["S/emb.weight"][30:].any() and not state["S/head.weight"].any() and not state["S/scale"].any()


def test_running_statistics_are_averaged_wherever_it_was_trained() -> None:
    base = {"bn.running_var": torch.full((3,), 1.0), "w": torch.zeros(3)}
    origin = {"bn.running_var": torch.full((3,), 8.0), "w": torch.ones(3)}
    expert = {"bn.running_var": torch.full((3,), 2.0), "w": torch.full((3,), 3.0)}
    merged, _, _ = merge(make("mean"), base, [expert], origins=[origin])
    assert merged["bn.running_var"].tolist() == [2.0] * 3 and merged["w"].tolist() == [2.0] * 3


def test_its_memory_is_counted() -> None:
    """What it was trained from, the expert once more, and the second delta."""
    step = Step(TensorSpec("w", (100, 100), torch.bfloat16))
    more = fold_bytes([make("mean")], step, origin=True) - fold_bytes([make("mean")], step)
    assert more == 100 * 100 * (4 + 4 + 4)
