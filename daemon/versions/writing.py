"""One head's next version while it is being written, in a temporary folder: its state, its weights, its record."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from daemon.checkpoints.checkpoint import OpenCheckpoint
from daemon.checkpoints.weight_names import weight_names
from daemon.config import Publish
from daemon.disk import durable
from daemon.layout import STATE_FILE
from daemon.manifest import FileEntry, Withdrawal
from daemon.versions.weight_files import METADATA, WeightFile, WeightsPlan, index_of, plan_weights
from projector.driver.steps import record_specs, state_specs
from projector.files.header import build_header
from projector.files.tensorfile import TensorWriter
from projector.method import Method, Totals
from projector.spec import Schema, TensorSpec
from projector.watch import Watch


@dataclass(frozen=True)
class Written:
    """A head's next version, all of it written and nothing of it named yet: to be sealed, and then published.

    published: the folder with its weights, which are listed. totals: after it. approximate, withdrawal, adamerging:
    as its manifest has them. state, record: None where it has none.
    """

    published: Path
    weights: Sequence[FileEntry]
    state_folder: Path
    state: FileEntry | None
    totals: Totals
    dtype: str
    approximate: bool = False
    withdrawal: Withdrawal | None = None
    record_file: Path | None = None
    record: FileEntry | None = None
    adamerging: Mapping[str, Any] | None = None


class Outputs:
    """Opens every file and reserves its space at once; `files` closes and syncs them."""

    def __init__(
        self, folder: Path, base: Schema, method: Method, plan: WeightsPlan, files: ExitStack, watch: Watch
    ) -> None:
        self._files = files
        self._watch = watch
        self.descriptors: list[int] = []
        self.published = folder / "published"
        self.state_folder = folder / "state"
        durable.make_folder(self.published, public=True)
        durable.make_folder(self.state_folder)
        self.state = self._writer(self.state_folder / STATE_FILE, state_specs(method, base))
        self.record_file = self.state_folder.with_name("record.safetensors")
        kept = record_specs(method, base)
        self.record = self._writer(self.record_file, kept) if kept else None
        files_planned, self._index = plan
        self._names = [file.name for file in files_planned]
        self.weights = [self._writer(self.published / file.name, list(file.specs)) for file in files_planned]

    def finish(self, totals: Totals, dtype: str, *, approximate: bool = False) -> Written:
        """Takes the digests, once everything is written and while the files are still open."""
        state = FileEntry(STATE_FILE, self.state.header.size, self.state.finish())
        record = None
        if self.record:
            record = FileEntry(self.record_file.name, self.record.header.size, self.record.finish())
        weights = [
            FileEntry(name, writer.header.size, writer.finish())
            for name, writer in zip(self._names, self.weights, strict=True)
        ]
        if self._index is not None:
            durable.write_file(self.published / self._index.name, self._index.text)
        return Written(
            self.published,
            weights,
            self.state_folder,
            state,
            totals,
            dtype,
            approximate,
            record_file=self.record_file if self.record else None,
            record=record,
        )

    def _writer(self, path: Path, specs: list[TensorSpec]) -> TensorWriter:
        size = build_header(specs, METADATA)[1].size
        fd = self._files.enter_context(durable.new_file(path, size))
        self.descriptors.append(fd)
        return TensorWriter(fd, specs, METADATA, self._watch)


def weights_plan(base: OpenCheckpoint, settings: Publish) -> WeightsPlan:
    """The files that every version's weights are published in, with the base's tensors in the dtype wanted: those that
    the base has, or what `publish.shard_bytes` makes of them, called alike.
    """
    specs = {spec.name: spec for spec in published_specs(base.tensors.schema, settings.dtype)}
    if settings.shard_bytes:
        names = weight_names([base.index] if base.index else [file.name for file in base.files])
        return plan_weights(specs.values(), settings.shard_bytes, names)
    files = [WeightFile(file.name, [specs[name] for name in file.reader.specs]) for file in base.files]
    return files, index_of(files, base.index) if base.index else None


def published_specs(base: Schema, dtype: str) -> list[TensorSpec]:
    """The base's tensors in the dtype that `publish.dtype` asks for: "base", or torch's name of one."""
    if dtype == "base":
        return list(base.values())
    wanted: torch.dtype = getattr(torch, dtype)
    return [replace(spec, dtype=wanted) if spec.merged else spec for spec in base.values()]
