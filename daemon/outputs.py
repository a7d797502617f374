"""One head's next version while it is being written, in a temporary folder: its state and its weights."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from daemon import durable
from daemon.checkpoint import INDEX
from daemon.config import Publish
from daemon.generations import FileEntry, plan_weights
from daemon.home import STATE_FILE
from projector.header import build_header
from projector.method import Method
from projector.spec import Schema, TensorSpec
from projector.steps import state_specs
from projector.tensorfile import TensorWriter
from projector.watch import Watch

METADATA = {"format": "pt"}  # what the stock loaders ask of a file


class Outputs:
    """Opens every file and reserves its space at once; `files` closes and syncs them."""

    def __init__(
        self, folder: Path, base: Schema, method: Method, settings: Publish, files: ExitStack, watch: Watch
    ) -> None:
        self._files = files
        self._watch = watch
        self.published = folder / "published"
        self.state_folder = folder / "state"
        durable.make_folder(self.published)
        durable.make_folder(self.state_folder)
        self.state = self._writer(self.state_folder / STATE_FILE, state_specs(method, base))
        plan, self._index = plan_weights(_published(base, settings.dtype), settings.shard_bytes)
        self._names = [file.name for file in plan]
        self.weights = [self._writer(self.published / file.name, list(file.specs)) for file in plan]
        self.entries: list[FileEntry] = []
        self.state_entry: FileEntry | None = None

    def finish(self) -> None:
        """Takes the digests, once everything is written and while the files are still open."""
        self.state_entry = FileEntry(STATE_FILE, self.state.header.size, self.state.finish())
        self.entries = [
            FileEntry(name, writer.header.size, writer.finish())
            for name, writer in zip(self._names, self.weights, strict=True)
        ]
        if self._index is not None:
            durable.write_file(self.published / INDEX, self._index)

    def _writer(self, path: Path, specs: list[TensorSpec]) -> TensorWriter:
        size = build_header(specs, METADATA)[1].size
        fd = self._files.enter_context(durable.new_file(path, size))
        return TensorWriter(fd, specs, METADATA, self._watch)


def _published(base: Schema, dtype: str) -> list[TensorSpec]:
    """The base's tensors in the dtype they are published in."""
    if dtype == "base":
        return list(base.values())
    wanted: torch.dtype = getattr(torch, dtype)
    return [replace(spec, dtype=wanted) if spec.floating else spec for spec in base.values()]
