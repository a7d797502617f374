"""A small stream of experts through real files and the real driver: what the laws run a method on."""

import hashlib
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import IO

import torch
from torch import Tensor

from projector.driver.averages import rule_of
from projector.driver.fold import Driver
from projector.driver.head import HeadFold, Prepared
from projector.driver.steps import prepared_specs, record_specs, state_specs
from projector.driver.view import View
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.method import Contribution, Method, Totals
from projector.spec import TensorSpec

Tensors = Mapping[str, Tensor]

SHAPES = {
    "scalar": (),
    "empty": (0, 4),
    "bias": (7,),
    "square.weight": (8, 8),
    "tall.weight": (12, 5),
    "wide.weight": (5, 12),
    "column.weight": (6, 1),
    "word_embeddings.weight": (40, 4),
    "experts.weight": (2, 4, 6),
    "conv.weight": (4, 3, 2, 2),
}


def stream(count: int, rank: int | None = None, seed: int = 0) -> tuple[Tensors, list[Tensors]]:
    """A base and `count` experts of every shape that matters; `rank` limits that of the matrices' task vectors."""
    generator = torch.Generator().manual_seed(seed)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    experts: list[Tensors] = []
    for _ in range(count):
        deltas = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
        for name, shape in SHAPES.items():
            if rank is not None and len(shape) == 2:
                left, right = (
                    torch.randn(shape[0], rank, generator=generator),
                    torch.randn(rank, shape[1], generator=generator),
                )
                deltas[name] = 0.1 * left @ right
        experts.append({name: base[name] + delta for name, delta in deltas.items()})
    return base, experts


def merge(
    method: Method,
    base: Tensors,
    experts: Iterable[Tensors],
    driver: Driver = Driver(block_bytes=1 << 20),  # noqa: B008
    *,
    counting: Sequence[float] | None = None,
    prepare: bool = False,
    one_sweep: bool = False,
    origins: Sequence[Tensors] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Totals]:
    """(merged weights, state, totals) after a stream of experts, through real files and the real driver.

    counting: each expert's weight, 1 where it is not given. prepare: what the method prepares is worked out between
    experts and read from a file. one_sweep: the weights are those that the last fold wrote itself. origins: what each
    expert was trained from, where its task vector is what was trained since.
    """
    totals = Totals()
    with _Files() as files:
        origin = Checkpoint([files.written(base)])
        state, fd = None, files.new()
        out = TensorWriter(fd, list(origin.schema.values()), {})
        for index, weights in enumerate(experts, start=1):
            source = Checkpoint(
                [files.written(weights)], {kind: files.written(sidecar(kind, weights)) for kind in method.needs}
            )
            expert = Contribution(index, sha256=_sha256(weights), weight=counting[index - 1] if counting else 1.0)
            since = Checkpoint([files.written(origins[index - 1])]) if origins else None
            expert = driver.survey(origin, source, method, expert, state, since)
            state_fd = files.new()
            after = TensorWriter(state_fd, state_specs(method, origin.schema), {})
            prepared = _prepared(driver, origin, method, state, files.new()) if prepare and state else None
            now = [out] if one_sweep else []
            head = HeadFold(method, totals, expert, state, after, prepared, now, origin=since)
            totals = driver.fold(origin, source, [head]).totals[0]
            state = TensorReader(state_fd)
        if not one_sweep or state is None:
            driver.read_out(origin, method, totals, state, [out])
        return _all(TensorReader(fd)), _all(state) if state else {}, totals


def views(method: Method, base: Tensors, experts: Iterable[Tensors], block_bytes: int = 1 << 20) -> list[Tensors]:
    """Every expert's view after all of them, through real files; of a method that keeps records of experts."""
    totals, state = Totals(), None
    records = []
    with _Files() as files:
        origin = Checkpoint([files.written(base)])
        for index, weights in enumerate(experts, start=1):
            after, record = files.new(), files.new()
            head = HeadFold(
                method,
                totals,
                Contribution(index, sha256=_sha256(weights)),
                state,
                TensorWriter(after, state_specs(method, origin.schema), {}),
                record=TensorWriter(record, record_specs(method, origin.schema), {}),
            )
            source = Checkpoint([files.written(weights)])
            totals = Driver(block_bytes=block_bytes).fold(origin, source, [head]).totals[0]
            state = TensorReader(after)
            records.append(TensorReader(record))
        return [_whole(View(origin, method, state, record, block_bytes)) for record in records if state]


def _whole(view: View) -> dict[str, Tensor]:
    """A view's blocks put together; a scalar, and an empty tensor, come in one."""
    blocks: dict[str, list[Tensor]] = {}
    for name, block in view.weights(view.base.schema, view.sums()):
        blocks.setdefault(name, []).append(block)
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in blocks.items()}


def _prepared(driver: Driver, base: Checkpoint, method: Method, state: TensorReader, fd: int) -> Prepared:
    writer = TensorWriter(fd, prepared_specs(method, base.schema), {})
    names = [name for name, spec in base.schema.items() if rule_of(method, spec).prepares(spec)]
    ready = set(driver.prepare(base, method, state, writer, names))
    return Prepared(TensorReader(fd), ready)


class _Files:
    """Unnamed temporary files that live as long as the block."""

    def __enter__(self) -> "_Files":
        self._open: list[IO[bytes]] = []
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._open:
            file.close()

    def new(self) -> int:
        self._open.append(tempfile.TemporaryFile())  # noqa: SIM115
        return self._open[-1].fileno()

    def written(self, tensors: Tensors) -> TensorReader:
        fd = self.new()
        writer = TensorWriter(fd, [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()], {})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        return TensorReader(fd)


def _sha256(tensors: Tensors) -> str:
    """An identity that depends on the values alone."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _all(reader: TensorReader) -> dict[str, Tensor]:
    return {name: reader.read(name) for name in reader.specs}


def sidecar(kind: str, tensors: Tensors) -> dict[str, Tensor]:
    """A made-up sidecar of an expert with these weights.

    A diagonal Fisher spans two decades. A Gram matrix is that of a layer's inputs, a quarter as many as they are long,
    so that those of two experts together are rank-deficient still.
    """
    made = {}
    for name, x in tensors.items():
        generator = torch.Generator().manual_seed(int(_sha256({name: x})[:15], 16))
        if kind == "fisher":
            made[name] = 10 ** (-2 * torch.rand(x.shape, generator=generator))
        elif x.ndim == 2:
            inputs = torch.randn(-(-x.shape[1] // 4), x.shape[1], generator=generator)
            made[name.removesuffix(".weight")] = inputs.T @ inputs
    return made
