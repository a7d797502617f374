"""A version's merged task vector as a LoRA adapter: what is published less the base, each matrix cut to a rank.

It is written beside the weights before the version is sealed, into a folder of its own: a version folder with an
adapter_config.json in it would itself be taken for an adapter. In memory are a few matrices at a time.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import fsum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daemon.checkpoints.adapter_config import ADAPTER, ADAPTER_WEIGHTS
from daemon.checkpoints.adapter_modules import Module, adapter_config, modules_of, read_config
from daemon.compute.resources import budget_for, driver
from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadConfig
from daemon.layout import ADAPTER_FOLDER, Home
from daemon.manifest import FileEntry
from daemon.sections import Adapter as Wanted
from daemon.versions.weight_files import METADATA
from projector.algebra.linalg import energy, on_device, one_thread
from projector.algebra.low_rank import LowRank, low_rank, low_rank_bytes
from projector.driver.device import load, unload
from projector.driver.pipeline import Pipeline
from projector.driver.steps import steps
from projector.files.header import build_header
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.names.naming import SAME
from projector.spec import TensorSpec
from projector.text import shown
from projector.watch import Watch

BLOCK_NUMEL = 1 << 20  # of a tensor that is read in rows
SWEEPS = 2  # one finds what moved, one cuts it


@dataclass(frozen=True)
class Adapter:
    """What the manifest says of a version's adapter.

    kept: the share of the task vector's squared norm that it keeps. tensors: of each tensor that moved, the rank it
    got (0 where no LoRA can move it), the share kept of its own squared norm, and its share in the whole's.
    """

    rank: int
    kept: float
    tensors: Mapping[str, Mapping[str, float]]

    def described(self) -> dict[str, Any]:
        """As the manifest has it."""
        return asdict(self)


class Adapting:
    """Writes the adapters that the settings ask for, over one base.

    Raises BadConfig where a matrix does not fit into the memory budget, or two modules would have one name.
    """

    def __init__(self, home: Home, base: Checkpoint, settings: Settings, watch: Watch) -> None:
        self._base = base
        self._config = read_config(home.base)
        self._wanted = {name: head.adapter for name, head in settings.heads.items() if head.adapter}
        self._naming = {"base": SAME, "experts": settings.admission.naming}
        self._driver = driver(settings.compute, watch)
        self._watch = watch
        for wanted in self._wanted.values():
            self._check(wanted)

    def work_bytes(self, heads: Iterable[str]) -> int:
        """What the watch will have been told once the adapters of these heads are written."""
        wanted = sum(head in self._wanted for head in heads)
        return SWEEPS * wanted * sum(spec.nbytes for spec in self._merged())

    def write(self, head: str, published: Path, files: Sequence[FileEntry], base_name: str) -> Adapter | None:
        """Puts the adapter into a folder in `published` where the head is to have one; that folder is the caller's to
        sync.

        files: the version's, its weights among them. base_name: what the base is called. None where no adapter is
        asked for, or where no matrix differs from the base's.
        """
        if head not in self._wanted:
            return None
        rank = self._wanted[head].rank
        with ExitStack() as closing:
            merged = Checkpoint(_opened(published, files, closing, self._watch))
            moved = self._moved(merged)
            modules = {name: found for name in moved if (found := self._modules(name, self._wanted[head]))}
            if not modules:
                return None
            folder = published / ADAPTER_FOLDER
            durable.make_folder(folder, public=True)
            tensors = self._cut(merged, moved, modules, rank, folder / ADAPTER_WEIGHTS)
        every = [module for found in modules.values() for module in found]
        durable.write_file(folder / ADAPTER, adapter_config(every, rank, base_name))
        total = fsum(moved.values())
        return Adapter(
            rank,
            fsum(one["kept"] * moved[name] for name, one in tensors.items()) / total,
            {name: {**one, "share": moved[name] / total} for name, one in tensors.items()},
        )

    def _check(self, wanted: Wanted) -> None:
        """Raises BadConfig where a matrix does not fit into the memory budget, or two modules would have one name."""
        cut = {name: found for name in self._base.schema if (found := self._modules(name, wanted))}
        need, name = max(((_bytes(self._base.schema[name], wanted.rank), name) for name in cut), default=(0, ""))
        budget = self._driver.budget_bytes
        if need > budget:
            enough = budget_for(need, self._driver.device.slab_bytes)
            raise BadConfig(
                f"{shown(name)} needs {need} bytes of memory for the adapter, the memory budget is {budget}",
                f"set compute.memory_budget to {enough} or more, or publish no adapter",
            )
        paths = Counter(module.path for found in cut.values() for module in found)
        twice = next((path for path, times in paths.items() if times > 1), None)
        if twice is not None and wanted.names == "experts":
            raise BadConfig(
                f"by admission.prefixes two modules of the adapter would be called {shown(twice)}",
                'change admission.prefixes, or set the adapter\'s names = "base"',
            )

    def _modules(self, name: str, wanted: Wanted) -> list[Module]:
        """Of one tensor of the base, by the names that they are to be published under."""
        naming = self._naming[wanted.names]
        found = modules_of(self._base.schema[name], self._base.schema, self._config)
        return [replace(one, path=naming.theirs(f"{one.path}.weight").removesuffix(".weight")) for one in found]

    @one_thread()
    def _moved(self, merged: Checkpoint) -> dict[str, float]:
        """The squared norm of each floating tensor's task vector, where it is not zero."""
        found = {}
        for spec in self._merged():
            norm = fsum(energy(delta) for _, delta in self._deltas(merged, spec))
            if norm:
                found[spec.name] = norm
            self._watch.advance(spec.nbytes)
        return found

    def _cut(
        self,
        merged: Checkpoint,
        moved: Mapping[str, float],
        modules: Mapping[str, Sequence[Module]],
        rank: int,
        path: Path,
    ) -> dict[str, dict[str, float]]:
        """Writes the factors, matrix by matrix; returns (rank, kept) of every tensor that moved."""
        specs = [spec for found in modules.values() for module in found for spec in module.specs(rank)]
        tensors: dict[str, dict[str, float]] = {name: {"rank": 0, "kept": 0.0} for name in moved}
        pipeline = Pipeline(self._driver.workers, self._driver.budget_bytes, self._driver.device.threads)
        with durable.new_file(path, build_header(specs, METADATA)[1].size) as fd:
            writer = TensorWriter(fd, specs, METADATA, self._watch)
            for spec, found in pipeline.run(
                (self._base.schema[name] for name in modules),
                lambda spec: _bytes(spec, rank),
                lambda spec: (spec, self._matrix(merged, spec)),
                lambda read: (read[0], self._approximated(*read, rank)),
            ):
                for module in modules[spec.name]:
                    for name, factor in module.factors(found, rank).items():
                        writer.write(name, factor)
                tensors[spec.name] = {"rank": found.rank, "kept": found.kept / found.total}
                self._watch.advance(spec.nbytes)
        self._watch.advance(sum(spec.nbytes for spec in self._merged() if spec.name not in modules))
        return tensors

    def _approximated(self, spec: TensorSpec, delta_MN: Tensor, rank: int) -> LowRank:
        def on(where: torch.device) -> LowRank:
            found = low_rank(load(delta_MN, where), rank)
            return LowRank(unload(found.up), unload(found.down), found.kept, found.total)

        with self._watch.phase("project"):
            return self._driver.device.run(on, on_device(spec.numel, _bytes(spec, rank)), spec.name, self._watch)

    def _matrix(self, merged: Checkpoint, spec: TensorSpec) -> Tensor:
        delta_MN = torch.empty(spec.shape, dtype=torch.float32)
        for rows, part in self._deltas(merged, spec):
            delta_MN[rows or slice(None)] = part
        return delta_MN

    def _deltas(self, merged: Checkpoint, spec: TensorSpec) -> Iterator[tuple[slice | None, Tensor]]:
        """The task vector of one tensor in float32, by rows; None is all of them."""
        for step in steps(self._base.schema, [spec.name], [], 4 * BLOCK_NUMEL):
            yield step.rows, merged.delta(spec, self._base.read(spec.name, step.rows), merged.fetch(spec, step.rows))

    def _merged(self) -> Iterator[TensorSpec]:
        return (spec for spec in self._base.schema.values() if spec.merged)


def _bytes(spec: TensorSpec, rank: int) -> int:
    """What one matrix takes while it is cut: its task vector, the parts read, the decomposition and its factors."""
    parts = max(BLOCK_NUMEL, spec.row_numel) * (2 * spec.dtype.itemsize + 12)
    return 4 * spec.numel + parts + low_rank_bytes(spec.shape, rank)


def _opened(published: Path, files: Sequence[FileEntry], closing: ExitStack, watch: Watch) -> Iterator[TensorReader]:
    for file in files:
        if file.name.endswith(".safetensors") and "/" not in file.name:
            fd = os.open(published / file.name, os.O_RDONLY | os.O_CLOEXEC)
            closing.callback(os.close, fd)
            yield TensorReader(fd, watch=watch)
