"""The driver: what it refuses, what it reports, and that neither workers nor a second head change a bit."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest
import torch
from torch import Tensor

from projector.driver.fold import Driver
from projector.driver.head import Folded, HeadFold
from projector.driver.steps import state_specs
from projector.errors import BadValues, Reason
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.laws.trial import stream
from projector.method import Contribution, Totals
from projector.methods import make
from projector.spec import TensorSpec
from projector.watch import Watch
from tests.oracles import rules

Tensors = dict[str, Tensor]


class Files:
    """Temporary files that are closed at the end of a test."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack

    def new(self) -> int:
        return self._stack.enter_context(tempfile.TemporaryFile()).fileno()

    def checkpoint(self, tensors: Tensors) -> Checkpoint:
        fd = self.new()
        writer = TensorWriter(fd, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], {})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return Checkpoint([TensorReader(fd)])


@pytest.fixture
def files() -> Iterator[Files]:
    with ExitStack() as stack:
        yield Files(stack)


def fold(files: Files, driver: Driver, base: Tensors, expert: Tensors, *names: str) -> tuple[Folded, list[str]]:
    """Folds a first expert into one head per method, and the sha256 of each head's state file."""
    origin = files.checkpoint(base)
    methods = [make(name) for name in names]
    writers = [TensorWriter(files.new(), state_specs(method, origin.schema), {}) for method in methods]
    heads = [HeadFold(m, Totals(), Contribution(1), None, writer) for m, writer in zip(methods, writers, strict=True)]
    return driver.fold(origin, files.checkpoint(expert), heads), [writer.finish() for writer in writers]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["scalar", "square.weight", "word_embeddings.weight", "conv.weight"])
def test_one_value_that_is_not_finite_is_refused(files: Files, name: str, bad: float) -> None:
    base, (expert,) = stream(1)
    expert = {**expert, name: expert[name].clone()}
    expert[name].reshape(-1)[-1] = bad
    with pytest.raises(BadValues, match=name) as caught:
        fold(files, Driver(block_bytes=64), dict(base), expert, "mean", "opcm")
    assert caught.value.reason is Reason.NOT_FINITE


def test_a_difference_that_overflows_is_refused(files: Files) -> None:
    with pytest.raises(BadValues):
        fold(files, Driver(), {"w": torch.full((2, 2), -3e38)}, {"w": torch.full((2, 2), 3e38)}, "mean")


def test_a_float64_value_beyond_float32_is_refused(files: Files) -> None:
    with pytest.raises(BadValues):
        fold(files, Driver(), {"w": torch.zeros(3)}, {"w": torch.full((3,), 1e300, dtype=torch.float64)}, "mean")


def test_weights_that_do_not_fit_the_published_dtype_are_refused(files: Files) -> None:
    base = {"w": torch.full((3,), 6e4, dtype=torch.float16)}
    origin, method = files.checkpoint(base), make("mean")
    fd = files.new()
    after = TensorWriter(fd, state_specs(method, origin.schema), {})
    source = files.checkpoint({"w": torch.full((3,), 7e4)})
    totals = Driver().fold(origin, source, [HeadFold(method, Totals(), Contribution(1), None, after)]).totals[0]
    out = TensorWriter(files.new(), list(origin.schema.values()), {})
    with pytest.raises(BadValues, match="float16"):
        Driver().read_out(origin, method, totals, TensorReader(fd), [out])


def test_the_norms_are_the_oracles(files: Files) -> None:
    base, (expert,) = stream(1)
    folded, _ = fold(files, Driver(block_bytes=64), dict(base), dict(expert), "mean")
    assert folded.task_vector.whole == pytest.approx(rules.norm(rules.task_vector(base, expert)), rel=1e-6)
    assert folded.base.whole == pytest.approx(rules.norm(base), rel=1e-12)
    assert [totals.experts for totals in folded.totals] == [1]


@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_workers_and_other_heads_change_no_bit(files: Files, block_bytes: int) -> None:
    base, (expert,) = stream(1)
    names = ("opcm", "mean", "ema")
    together = {
        workers: fold(files, Driver(block_bytes=block_bytes, workers=workers), dict(base), dict(expert), *names)
        for workers in (1, 2, 5)
    }
    assert together[1] == together[2] == together[5]
    for name, digest in zip(names, together[1][1], strict=True):
        assert fold(files, Driver(block_bytes=block_bytes), dict(base), dict(expert), name)[1] == [digest]


def test_the_watch_counts_the_bytes_of_the_model(files: Files) -> None:
    class Counting(Watch):
        total = 0

        def advance(self, nbytes: int) -> None:
            self.total += nbytes

    base, (expert,) = stream(1)
    counting = Counting()
    fold(files, Driver(watch=counting, block_bytes=64), dict(base), dict(expert), "mean", "opcm")
    assert counting.total == sum(tensor.nbytes for tensor in base.values())


def test_a_watch_that_raises_stops_the_work(files: Files) -> None:
    class Stop(Exception):
        pass

    class Stopping(Watch):
        def advance(self, nbytes: int) -> None:
            raise Stop

    base, (expert,) = stream(1)
    with pytest.raises(Stop):
        fold(files, Driver(watch=Stopping(), workers=2), dict(base), dict(expert), "mean")


def test_a_merged_tensor_is_written_without_a_look_at_every_file(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    def specs(writer: TensorWriter) -> Mapping[str, TensorSpec]:
        nonlocal looks
        looks += 1
        return writer.header.specs

    monkeypatch.setattr(TensorWriter, "specs", property(specs))
    base = {f"layers.{i}.weight": torch.full((2, 2), 1.0 + i) for i in range(40)}
    expert = {name: 2 * tensor for name, tensor in base.items()}
    found = []
    for count in (1, 20):
        origin, method = files.checkpoint(base), make("mean")
        schema = list(origin.schema.values())
        shards = [TensorWriter(files.new(), schema[i::count], {}) for i in range(count)]
        state, looks = TensorWriter(files.new(), state_specs(method, origin.schema), {}), 0
        head = HeadFold(method, Totals(), Contribution(1), None, state, weights=shards)
        Driver().fold(origin, files.checkpoint(expert), [head])
        found.append(looks)
        for writer in shards:
            reader = writer.reader()
            for name in reader.specs:
                assert torch.equal(reader.read(name), expert[name])
    assert found[1] - found[0] <= 4 * 20, found
