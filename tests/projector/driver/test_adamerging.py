"""Learned coefficients against autograd through a model, and what a sweep holds and reads."""

import hashlib
import io
import json
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import linear

from daemon.adamerging import answer, entropy
from projector.driver.adamerging import Adamerging
from projector.errors import BadSchema, BadValues
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.lora.config import LoraConfig
from projector.lora.expert import LoraExpert
from projector.spec import TensorSpec
from tests.oracles.adamerging import adamerging

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, EXPERTS = 25, 3
WEIGHTS = (1.0, 2.5, 1.0)


class Tied(nn.Module):
    """Words to logits of words, by the same matrix."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6, dtype=dtype)
        self.hidden = nn.Linear(6, 6, dtype=dtype)
        self.unused = nn.Linear(6, 2, dtype=dtype)
        self.output = nn.Linear(6, 12, bias=False, dtype=dtype)
        self.output.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        return linear(torch.tanh(self.hidden(self.embed(words))), self.output.weight)


def batches(step: int) -> Sequence[Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randint(0, 12, (8,), generator=draw) for _ in range(EXPERTS)]


def drawn(model: nn.Module, spread: float) -> dict[str, Tensor]:
    """The model's weights with noise; both names of the tied one."""
    own = {name: one.detach() for name, one in model.named_parameters()}
    found = {name: one + spread * torch.randn(one.shape, dtype=one.dtype) for name, one in own.items()}
    return {**found, "output.weight": found["embed.weight"].clone()}


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Callable[[str, dict[str, Tensor]], Checkpoint]]:
    opened = []

    def checkpoint(name: str, tensors: dict[str, Tensor]) -> Checkpoint:
        save_file(tensors, tmp_path / name)
        opened.append(os.open(tmp_path / name, os.O_RDONLY))
        return Checkpoint([TensorReader(opened[-1])])

    yield checkpoint
    for fd in opened:
        os.close(fd)


def asked(model: nn.Module, folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """One question to the helper, as the daemon asks it; its answer. A print is no answer."""

    def logits(number: int) -> Iterator[Tensor]:
        print("a library has something to say" * (not number))
        yield from (model(batch) for batch in batches(number))

    said = {"step": step, "weights": str(folder / "weights"), "gradients": str(folder / "gradients")}
    out = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", io.StringIO(json.dumps(said) + "\n"))
        patch.setattr(sys, "stdout", out)
        answer(model, logits)
    return float(json.loads(out.getvalue())["entropy"])


@pytest.mark.parametrize(
    ("dtype", "tolerance", "lr"),
    [(torch.float64, 1e-12, 1e-3), (torch.float64, 1e-12, 0.1), (torch.float32, 1e-5, 1e-3)],
    ids=["authors", "clamped", "float32"],
)
def test_it_is_autograd_through_the_model(
    dtype: torch.dtype,
    tolerance: float,
    lr: float,
    files: Callable[[str, dict[str, Tensor]], Checkpoint],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In float64 there is no rounding between the two but that of sums; at the larger step many are clamped."""
    torch.manual_seed(0)
    model = Tied(dtype)
    base, *experts = [drawn(model, spread) for spread in (0.0, *[0.4] * EXPERTS)]
    for one in experts:
        one["hidden.bias"] = base["hidden.bias"].clone()  # nobody trained it
    ours = Adamerging(
        files("base", base), [files(f"{n}", one) for n, one in enumerate(experts)], WEIGHTS, 0.3, lr=lr, block_bytes=96
    )
    assert ["embed.weight", "output.weight"] in ours.layers and len(ours.layers) == 5
    found = []
    fd = os.open(tmp_path / "weights", os.O_RDWR | os.O_CREAT)
    writer = TensorWriter(fd, ours.specs, {})
    ours.sweep([writer], hashed=False)
    for step in range(STEPS):
        found.append(asked(model, tmp_path, step, monkeypatch))
        slopes = os.open(tmp_path / "gradients", os.O_RDONLY)
        ours.sweep([writer], Checkpoint([TensorReader(slopes)]), hashed=False)
        os.close(slopes)
    os.close(fd)
    wide = [{name: one[name].double() for name, _ in model.named_parameters()} for one in (base, *experts)]
    wanted, entropies = adamerging(
        Tied(torch.float64), wide[0], wide[1:], WEIGHTS, batches, steps=STEPS, start=0.3, lr=lr
    )
    said = ours.described()
    errors = {
        name: float((torch.tensor(said[name], dtype=torch.float64) - one).abs().max()) for name, one in wanted.items()
    }
    print(errors, max(abs(a - b) for a, b in zip(found, entropies, strict=True)))
    assert max(errors.values()) < tolerance
    assert found == pytest.approx(entropies, rel=10 * tolerance)
    assert said["output.weight"] == said["embed.weight"] != [0.3] * EXPERTS
    assert said["unused.weight"] == said["hidden.bias"] == [0.3] * EXPERTS  # no gradient, and no task vector
    counted = [value for name in wanted for value in said[name]]
    assert (min(counted) == 0.0 and max(counted) == 1.0) is (lr == 0.1)
    merged = load_file(tmp_path / "weights")
    for name, one in wanted.items():
        shares = [weight * float(value) for weight, value in zip(WEIGHTS, one, strict=True)]
        truth = wide[0][name] + sum(
            share * (expert[name] - wide[0][name]).float().double()
            for share, expert in zip(shares, wide[1:], strict=True)
        )
        assert torch.allclose(merged[name].double(), truth, atol=10 * tolerance), name


def test_the_entropy_is_that_of_the_softmax() -> None:
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[100.0, 0.0], [float("-inf"), 0.0]]], dtype=torch.bfloat16)
    assert entropy(torch.zeros(3, 4)).item() == pytest.approx(torch.tensor(4.0).log().item())
    assert entropy(logits[:, :1]).item() == pytest.approx(torch.tensor(2.0).log().item() / 2)


class Counting(Checkpoint):
    """An expert that counts what it reads, and how much of its task vectors is in memory."""

    reads = live = peak = 0

    def delta(self, spec: TensorSpec, base: Tensor, fetched: Sequence[Tensor]) -> Tensor:
        found = super().delta(spec, base, fetched)
        Counting.reads += found.numel()
        Counting.live += found.nbytes
        Counting.peak = max(Counting.peak, Counting.live)
        weakref.finalize(found, self._gone, found.nbytes)
        return found

    @staticmethod
    def _gone(nbytes: int) -> None:
        Counting.live -= nbytes


@pytest.mark.parametrize(("budget", "times"), [(1 << 20, 1), (0, 2)], ids=["a tensor of all", "a block of one"])
def test_a_step_reads_each_expert_once_or_in_blocks_twice(budget: int, times: int, tmp_path: Path) -> None:
    """However many tensors there are: what is held is a tensor of all experts, or a block of one or two."""
    rows, block = 64, 8 * 16 * 4
    tensors = {f"layers.{n}.weight": torch.randn(rows, 16) for n in range(4)}
    opened = []
    for name in ("base", "a", "b", "c"):
        save_file({key: one + torch.randn(rows, 16) for key, one in tensors.items()}, tmp_path / name)
        opened.append(TensorReader(os.open(tmp_path / name, os.O_RDONLY)))
    base, gradients = Checkpoint(opened[:1]), Checkpoint(opened[3:])
    for reader in opened:
        assert isinstance(reader, TensorReader)
    ours = Adamerging(
        base, [Counting([one]) for one in opened[1:]], (1.0,) * 3, 0.3, block_bytes=block, budget_bytes=budget
    )
    writer = TensorWriter(os.open(tmp_path / "weights", os.O_RDWR | os.O_CREAT), ours.specs, {})
    Counting.reads = Counting.live = Counting.peak = 0
    ours.sweep([writer], gradients, hashed=False)
    assert Counting.reads == times * 3 * 4 * rows * 16
    assert Counting.live == 0
    assert Counting.peak == (3 * rows * 16 * 4 if budget else 2 * block)  # or one held by the loop, one being made


@pytest.mark.parametrize(
    ("gradients", "error", "word"),
    [
        ({}, BadSchema, "no gradient at all"),
        ({"none": torch.ones(1)}, BadSchema, "none, which is no merged weight"),
        ({"w": torch.ones(2, 2)}, BadSchema, r"float32 \[2, 2\], the weight has shape \[2, 3\]"),
        ({"w": torch.ones(2, 3, dtype=torch.int32)}, BadSchema, "int32"),
        ({"w": torch.tensor([[0.0, float("nan"), 0.0]] * 2)}, BadValues, "the gradient by w holds NaN"),
    ],
    ids=["empty", "strange", "shape", "dtype", "nan"],
)
def test_gradients_that_are_none(
    gradients: dict[str, Tensor],
    error: type[Exception],
    word: str,
    files: Callable[[str, dict[str, Tensor]], Checkpoint],
    tmp_path: Path,
) -> None:
    base, expert = files("base", {"w": torch.zeros(2, 3)}), files("expert", {"w": torch.ones(2, 3)})
    ours = Adamerging(base, [expert], [1.0], 0.3)
    fd = os.open(tmp_path / "weights", os.O_RDWR | os.O_CREAT)
    with pytest.raises(error, match=word):
        ours.sweep([TensorWriter(fd, ours.specs, {})], files("gradients", gradients))
    os.close(fd)
    assert ours.coefficients.steps == 0 and ours.described() == {"w": [0.3]}


def test_adapters_bfloat16_running_statistics_and_buffers(
    files: Callable[[str, dict[str, Tensor]], Checkpoint], tmp_path: Path
) -> None:
    """Beside an expert that brings all tensors: an adapter leaves all but one matrix as it is."""
    torch.manual_seed(0)
    base = {
        "up.weight": torch.randn(6, 4).bfloat16(),
        "norm.running_mean": torch.randn(6),
        "norm.weight": torch.ones(6).bfloat16(),
        "steps": torch.tensor(7),
    }
    whole = {name: (one + 1).to(one.dtype) if one.is_floating_point() else one for name, one in base.items()}
    a, b = torch.randn(2, 4), torch.randn(6, 2)
    there = files("base", base)
    parts = {"base_model.model.up.lora_A.weight": a, "base_model.model.up.lora_B.weight": b}
    files("adapter", parts)
    fd = os.open(tmp_path / "adapter", os.O_RDONLY)
    adapter = LoraExpert([TensorReader(fd)], {}, LoraConfig(r=2, lora_alpha=4), there)
    ours = Adamerging(there, [files("whole", whole), adapter], (1.0, 3.0), 0.25)
    assert {spec.name: spec.dtype for spec in ours.specs} == dict.fromkeys(base.keys() - {"steps"}, torch.float32)
    gradients = {"up.weight": torch.randn(6, 4), "norm.weight": torch.ones(6).bfloat16()}
    published = os.open(tmp_path / "published", os.O_RDWR | os.O_CREAT)
    writer = TensorWriter(published, list(there.schema.values()), {})
    ours.sweep([writer], files("gradients", gradients))
    digest = writer.finish()
    for one in (fd, published):
        os.close(one)
    assert digest == hashlib.sha256((tmp_path / "published").read_bytes()).hexdigest()

    taus = [(whole["up.weight"].float() - base["up.weight"].float()).double(), 2 * (b @ a).double()]
    slopes = [weight * float((gradients["up.weight"] * tau).sum()) for weight, tau in zip((1, 3), taus, strict=True)]
    shares = [0.25 - 1e-3 * (1 if slope > 0 else -1) for slope in slopes]  # Adam's first step, whatever the slope
    said = ours.described()
    assert said["up.weight"] == pytest.approx(shares, abs=1e-6)
    assert said["norm.weight"] == [pytest.approx(0.249), None] and said.keys() == {"up.weight", "norm.weight"}
    merged = load_file(tmp_path / "published")
    wanted = base["up.weight"].double() + shares[0] * taus[0] + 3 * shares[1] * taus[1]
    assert torch.allclose(merged["up.weight"].double(), wanted, rtol=2**-8)
    assert torch.allclose(merged["norm.running_mean"], base["norm.running_mean"] + 1 / 4)  # by their weights
    assert merged["steps"] == 7
