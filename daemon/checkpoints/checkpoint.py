"""Opens a checkpoint in any layout: one .safetensors file, a folder with one, or shards with their index.

Everything is opened relative to a descriptor, by a single path component, and from then on the descriptor is used, not
the name. Raises Refused for what can never become good, NotYet for what may only be unfinished.
"""

import os
import stat
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from daemon.checkpoints.adapter_config import ADAPTER as ADAPTER
from daemon.checkpoints.adapter_config import (
    ADAPTER_WEIGHTS,
    MLX_WEIGHTS,
    OpenAdapter,
    adapters_below,
    check_alone,
    check_no_factors,
    check_not_merged,
    check_tied,
    open_adapter,
)
from daemon.checkpoints.adapter_modules import has_output
from daemon.checkpoints.expert_json import ABOUT, About, read_about
from daemon.checkpoints.hints import below, inner
from daemon.checkpoints.nesting import checkpoint_in
from daemon.checkpoints.opening import READY_MARKER, Stamp, folders_with, not_a_file, open_entry, stamp
from daemon.checkpoints.shard_index import check_places, read_index, shard_names
from daemon.checkpoints.weight_names import (
    INDEX,
    NOT_OF_A_MODEL,
    SHARD_OF_MANY,
    WEIGHTS,
    checkpoints,
    is_index,
    other_format,
)
from daemon.disk import durable
from daemon.errors import DaemonError, NotYet, Reason, Refused
from projector.errors import BadFile, BadSchema, ProjectorError
from projector.errors import Reason as ProjectorReason
from projector.files.header import MAX_HEADER_BYTES, PREFIX_BYTES
from projector.files.source import Checkpoint, identity
from projector.files.tensorfile import RunningDigest, TensorReader
from projector.lora.adapter_fitting import fitted_adapter
from projector.lora.expert import LoraExpert
from projector.lora.targets import Targets
from projector.matching.fitting import fitted
from projector.matching.matching import matched
from projector.names.naming import SAME, Naming
from projector.text import NEW, listed, shown
from projector.watch import SILENT, Watch

SIDECARS = ("fisher", "gram")
PICKLED, PICKLED_INDEX, PICKLED_ADAPTER = "pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_OPENINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
LFS_OPENING = b"version https://git-lfs"


@dataclass(frozen=True)
class OpenFile:
    """One file of a checkpoint, held by descriptor."""

    name: str
    fd: int
    stamp: Stamp
    reader: TensorReader
    digest: RunningDigest


@dataclass(frozen=True)
class OpenAbout:
    """An expert's expert.json, held by descriptor, and what it says."""

    fd: int
    stamp: Stamp
    content: About


class OpenCheckpoint:
    """A checkpoint held open. Close it, or use it as a context manager.

    sidecars: by kind ("fisher", "gram"). about: its expert.json, None where there is none. naming: how its names become
    the base's once it is checked. adapter: the config of a LoRA, whose tensors are its own until it is checked. folder:
    the descriptor of the folder with its weights, if it is one. index: the name of the file that lists its shards, if
    it has shards. outer, within: the descriptor of the folder that was dropped, and the path of `folder` below it, if
    it is not that itself. names: all that is in `folder`, and the ready marker of the one that was dropped.
    """

    outer: int | None = None
    within: str | None = None
    names: frozenset[str] = frozenset()

    def __init__(
        self,
        kind: str,
        files: Sequence[OpenFile],
        sidecars: Mapping[str, OpenFile],
        about: OpenAbout | None,
        closing: ExitStack,
        naming: Naming = SAME,
        adapter: OpenAdapter | None = None,
        folder: int | None = None,
        index: str | None = None,
    ) -> None:
        self.kind = kind
        self.index = index
        self.naming = naming
        self.files = files
        self.about = about.content if about else None
        self._sidecars = sidecars
        self._adapter = adapter
        held = [*files, *sidecars.values(), *(one for one in (about, adapter) if one)]
        self._stamps = {one.fd: one.stamp for one in held}
        self.folder = folder
        self._closing = closing
        self.tensors = Checkpoint(
            [file.reader for file in files], {need: file.reader for need, file in sidecars.items()}
        )

    @property
    def weight(self) -> float:
        """How much it counts beside others: what its expert.json says, else 1."""
        return self.about.weight if self.about else 1.0

    @property
    def every_file(self) -> list[OpenFile]:
        """Its weights, and its sidecars."""
        return [*self.files, *self._sidecars.values()]

    @property
    def sizes(self) -> list[int]:
        """The bytes of each file of tensors, its sidecars among them."""
        return [file.reader.header.size for file in self.every_file]

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes)

    def check(self, base: Checkpoint, base_config: Mapping[str, Any] | None = None) -> None:
        """Holds its tensors, and its sidecars', against the base's; from here on they have the base's names.

        base_config: the base's config.json, for an expert that arrives: then its own expert.json counts, and what
        its names need to fit is found where the naming is lenient; one that was merged is read as it was then.
        Raises BadSchema and Refused.
        """
        if base_config is not None and self.about:
            self.naming = self.about.naming(self.naming, (*self.tensors.schema, *base.schema))
        with below(self.within):
            self._check(base, base_config)

    def _check(self, base: Checkpoint, base_config: Mapping[str, Any] | None) -> None:
        if self._adapter:
            self._check_adapter(self._adapter, base, base_config)
            return
        try:
            self.naming, self.tensors = self._fitted(self.naming, base, base_config)
        except BadSchema as error:
            if base_config is None or self.naming.lenient:
                raise
            with suppress(BadSchema, Refused):
                self._fitted(replace(self.naming, lenient=True), base, base_config)
                hint = f"{error.hint}; or let admission.lenient_names be true, with which it is merged as it is"
                error = BadSchema(error.reason, str(error), hint)
            raise error from None

    def _fitted(
        self, naming: Naming, base: Checkpoint, base_config: Mapping[str, Any] | None
    ) -> tuple[Naming, Checkpoint]:
        """How its names are read, and its tensors under the base's names."""
        if base_config is not None:
            naming = fitted(naming, self.tensors, base, tied=has_output(base_config))
        resolved = naming.resolve(self.tensors.schema, base.schema).values()
        strange = (name for name in resolved if name not in base.schema)
        check_no_factors(strange, self.files[0].name, in_folder=self.folder is not None)
        return naming, matched(base, self.tensors, naming)

    def _check_adapter(self, adapter: OpenAdapter, base: Checkpoint, base_config: Mapping[str, Any] | None) -> None:
        readers = [file.reader for file in self.files]
        beside = {kind: file.reader for kind, file in self._sidecars.items()}
        if base_config is not None:
            tied = has_output(base_config)
            self.naming = fitted_adapter(self.naming, self.tensors.schema, base.schema, tied=tied)
        # one that was merged was let in before, maybe when nobody looked for its targets
        config = adapter.config if base_config is not None else replace(adapter.config, targets=Targets())
        self.tensors = adapted = LoraExpert(readers, beside, config, base, self.naming)
        if base_config is not None:
            check_not_merged(adapted)
            check_tied(adapted, base.schema, base_config)

    def identity(self) -> str:
        """The sha256 that stands for this checkpoint: that of its weights, and of an adapter's config.

        Reads what has not been read yet.
        """
        config = {ADAPTER: self._adapter.sha256} if self._adapter else {}
        return identity({file.name: file.reader.sha256() for file in self.files} | config)

    def digest_tensors(self) -> None:
        """From here on `content` is worked out as the tensors are read."""
        for file in self.files:
            file.reader.digest_tensors()

    def content(self) -> str:
        """The sha256 that stands for what it does to the base, whatever its files are like: see `Checkpoint.content`.

        Only once it is checked. Reads what has not been hashed yet.
        """
        return self.tensors.content()

    def older_content(self, base: Checkpoint) -> str | None:
        """What an earlier mainstem took for `content`, where that was another."""
        return self.tensors.older_content(base)

    def sidecar_digests(self) -> dict[str, str]:
        """The sha256 of each sidecar that it was opened with, by kind; reads what has not been read yet."""
        return {kind: file.reader.sha256() for kind, file in self._sidecars.items()}

    def sync(self) -> None:
        """Makes the checkpoint's own bytes durable, and every name in its folder: whoever dropped it may not have."""
        for fd in self._stamps:
            durable.sync(fd)
        if self.outer is not None:
            durable.sync_names(self.outer)

    def unchanged(self) -> bool:
        """True while no file has been written to, renamed or replaced since it was opened."""
        try:
            return all(stamp(os.fstat(fd)) == before for fd, before in self._stamps.items())
        except OSError:  # of a server that has forgotten the file
            return False

    def holds(self, fd: object) -> bool:
        """True for a descriptor of one of its files: an error that names it arose in reading this checkpoint."""
        return fd in self._stamps or (fd is not None and fd in (self.folder, self.outer))

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    folder_fd: int,
    name: str,
    *,
    follow: bool = False,
    needs: Sequence[str] = (),
    watch: Watch = SILENT,
    naming: Naming = SAME,
) -> OpenCheckpoint:
    """Opens the checkpoint `name` in the folder `folder_fd`, with the sidecars it must bring.

    `follow`: symbolic links are followed; only for paths that the person names, never in the inbox.
    """
    with ExitStack() as closing:
        fd = open_entry(folder_fd, name, follow, closing)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            if SHARD_OF_MANY.search(name):
                raise Refused(
                    Reason.INCOMPLETE,
                    f"{shown(name)} is one shard of several",
                    f"drop the folder that holds all shards and {INDEX}",
                )
            if needs:
                raise Refused(Reason.MISSING_SIDECAR, *_missing(needs[0]))
            opened = OpenCheckpoint("file", [_weights(fd, name, watch)], {}, None, closing, naming)
        else:
            folder, within = checkpoint_in(fd, follow, closing)
            with below(within):
                opened = _open_folder(folder, follow, needs, watch, closing, naming)
            opened.outer, opened.within = fd, within
            if within and READY_MARKER in os.listdir(fd):
                opened.names |= {READY_MARKER}
        opened._closing = closing.pop_all()
        return opened


def open_path(
    path: Path, watch: Watch = SILENT, *, follow: bool = True, needs: Sequence[str] = (), naming: Naming = SAME
) -> OpenCheckpoint:
    """Opens a checkpoint that the person names; `follow`: through symbolic links. Raises Refused or NotYet."""
    named = Path(os.path.abspath(path))  # noqa: PTH100 - a link keeps its own name: in a hub's cache its target has none
    parent = os.open(named.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_checkpoint(parent, named.name, follow=follow, needs=needs, watch=watch, naming=naming)
    finally:
        os.close(parent)


def identity_at(path: Path, needs: Sequence[str] = (), watch: Watch = SILENT) -> str | None:
    """The identity of what lies there, with no link followed; None where that is no checkpoint, or without a sidecar
    that is needed. Raises OSError.
    """
    try:
        with open_path(path, watch, follow=False, needs=needs) as checkpoint:
            return checkpoint.identity()
    except (DaemonError, ProjectorError):
        return None


def _open_folder(
    fd: int, follow: bool, needs: Sequence[str], watch: Watch, closing: ExitStack, naming: Naming
) -> OpenCheckpoint:
    names = set(os.listdir(fd))
    beside = {f"{kind}.safetensors" for kind in (*SIDECARS, *needs)}
    there = checkpoints(names, beside)

    def opened(name: str) -> OpenFile:
        file = open_entry(fd, name, follow, closing)
        with below(name):
            return _weights(file, name, watch)

    def whole(name: str) -> list[OpenFile]:
        """The files of the checkpoint that this file or index is."""
        if not is_index(name):
            return [opened(name)]
        weight_map = read_index(open_entry(fd, name, follow, closing), name)
        shards = [opened(shard) for shard in shard_names(weight_map, names, name)]
        check_places(weight_map, {name: file.name for file in shards for name in file.reader.specs}, name)
        return shards

    adapter, index = None, next(filter(is_index, there), None)
    kind = "sharded" if index else "folder"
    if ADAPTER_WEIGHTS in names:
        check_alone(fd, names, whole=(WEIGHTS, INDEX, PICKLED))
    if {ADAPTER, ADAPTER_WEIGHTS} <= names:
        adapter = open_adapter(open_entry(fd, ADAPTER, follow, closing))
        kind, index, files = "adapter", None, [opened(ADAPTER_WEIGHTS)]
    elif there in ([WEIGHTS], [INDEX]):
        files = whole(there[0])
    elif MLX_WEIGHTS in names:  # its checkpoints may lie beside it
        files = [opened(MLX_WEIGHTS)]
    elif ADAPTER_WEIGHTS in names or (ADAPTER in names and not any(name.endswith(PICKLE_SUFFIXES) for name in names)):
        missing = ADAPTER if ADAPTER_WEIGHTS in names else ADAPTER_WEIGHTS
        raise NotYet(Reason.INCOMPLETE, f"{missing} of the adapter is missing", "copy both files of it")
    elif len(there) == 1:
        files = whole(there[0])
    elif not there and any(name.endswith(PICKLE_SUFFIXES) for name in names):
        # not yet: what trainers save beside the weights is pickled too, and may come first
        raise NotYet(Reason.PICKLE, "the folder holds pickled weights only", _pickled_in(names))
    elif below_it := adapters_below(fd):
        raise NotYet(
            Reason.NO_WEIGHTS,
            f"its adapters are in {listed(below_it)}",
            f"drop the adapter's folder itself: `cp -r {inner(below_it[0])} {NEW}`",
        )
    elif not there and (below_it := folders_with(fd, ".safetensors")):
        whole_model = inner(below_it[0])
        what = f"give the folder itself, {whole_model}: as an expert, `cp -r {whole_model} {NEW}`"
        raise NotYet(Reason.NO_WEIGHTS, f"its weights are in {listed(below_it)}", what)
    elif not there and (known := other_format(names)):
        raise NotYet(Reason.NO_WEIGHTS, f"it holds {known[0]}", known[1])
    elif not there and (below_it := folders_with(fd, ".distcp")) and (known := other_format([".distcp"])):
        with below(below_it[0]):
            raise NotYet(Reason.NO_WEIGHTS, f"it holds {known[0]}", known[1])
    elif there:
        raise NotYet(
            Reason.NO_WEIGHTS, f"the folder holds several models: {listed(there)}", "give each a folder of its own"
        )
    else:
        coming = any(SHARD_OF_MANY.search(name) for name in names)
        raise NotYet(
            Reason.INCOMPLETE if coming else Reason.NO_WEIGHTS,
            f"the folder has neither {WEIGHTS} nor {INDEX}",
            "save the model with save_pretrained(..., safe_serialization=True)",
        )
    for need in needs:
        if f"{need}.safetensors" not in names:
            raise NotYet(Reason.MISSING_SIDECAR, *_missing(need))
    sidecars = {need: opened(f"{need}.safetensors") for need in needs}
    about = _about(open_entry(fd, ABOUT, follow, closing)) if ABOUT in names else None
    found = OpenCheckpoint(kind, files, sidecars, about, closing, naming, adapter, fd, index)
    found.names = frozenset(names)
    return found


def _about(fd: int) -> OpenAbout:
    before = stamp(os.fstat(fd))
    return OpenAbout(fd, before, read_about(fd))


def _weights(fd: int, name: str, watch: Watch) -> OpenFile:
    """A .safetensors file by descriptor, its header checked."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise not_a_file(name)
    before = stamp(os.fstat(fd))
    opening = os.pread(fd, len(LFS_OPENING), 0)
    if opening == LFS_OPENING:
        raise NotYet(
            Reason.LFS_POINTER,
            f"{shown(name)} is a git-lfs pointer, not the file it stands for",
            "run `git lfs pull` where it came from and drop the file itself",
        )
    if name.endswith(PICKLE_SUFFIXES) or is_pickle(opening):
        raise _pickle(f"{shown(name)} is pickled, which can run code when it is loaded")
    if not name.endswith(".safetensors"):
        if known := other_format([name]):
            raise Refused(Reason.NO_WEIGHTS, f"{shown(name)} holds {known[0]}", known[1])
        raise Refused(
            Reason.NO_WEIGHTS,
            f"{shown(name)} is no .safetensors file",
            "drop a .safetensors file, or a folder that save_pretrained wrote",
        )
    digest = RunningDigest(fd, watch)
    try:
        return OpenFile(name, fd, before, TensorReader(fd, digest, watch), digest)
    except BadFile as error:
        if error.reason is ProjectorReason.TRUNCATED:
            raise NotYet(error.reason, f"{shown(name)}: {error}", error.hint) from error
        raise BadFile(error.reason, f"{shown(name)}: {error}", error.hint) from error


def is_pickle(opening: bytes) -> bool:
    """True for what a file of pickled weights begins with, whatever it is called."""
    # a header of 640 bytes begins as a pickle does, but no pickle as a header of a length that is allowed
    no_header = len(opening) < PREFIX_BYTES or int.from_bytes(opening[:PREFIX_BYTES], "little") > MAX_HEADER_BYTES
    return opening.startswith(PICKLE_OPENINGS) and no_header


def _missing(need: str) -> tuple[str, str]:
    """What is wrong where a sidecar is missing, and what to do."""
    return (
        f"{need}.safetensors is missing, which a method of this home needs",
        "drop a folder with the weights and this file in it; docs/sidecars.md says how to make one",
    )


def convert_hint(name: str | None = None) -> str:
    """What to do with a pickle: with the whole expert, or with the file of that name in it."""
    return f"convert it, without running what is in it: `mainstem convert {inner(name)} {NEW}`"


def _pickled_in(names: Collection[str]) -> str:
    """What to do with a folder of pickles. Where a loader would not know which of them it is, that is named."""
    if not {PICKLED, PICKLED_INDEX, PICKLED_ADAPTER}.isdisjoint(names):
        return convert_hint()
    weights = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES) and name not in NOT_OF_A_MODEL)
    others = f" (or {listed(weights[1:])}, if that has the weights)" if len(weights) > 1 else ""
    return convert_hint(weights[0]) + others if weights else "drop the folder with the weights: these are none"


def _pickle(detail: str) -> Refused:
    return Refused(Reason.PICKLE, detail, convert_hint())
