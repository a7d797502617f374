"""Opens a checkpoint in any layout: one .safetensors file, a folder with model.safetensors, or shards with their index.

Everything is opened relative to a descriptor, by a single path component, and from then on the descriptor is used, not
the name. Raises Refused for what can never become good, NotYet for what may only be unfinished.
"""

import errno
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from daemon import durable
from daemon.errors import NotYet, Reason, Refused
from daemon.inbox import Stamp, stamp
from projector.errors import BadFile
from projector.errors import Reason as ProjectorReason
from projector.source import Checkpoint, identity
from projector.tensorfile import RunningDigest, TensorReader
from projector.text import shown
from projector.watch import SILENT, Watch

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
MAX_INDEX_BYTES = 16 << 20
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PICKLE_OPENINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
PICKLE_HINT = "save it as safetensors: safetensors.torch.save_file(weights, path)"
LFS_OPENING = b"version https://git-lfs"
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+")
SHARD_OF_MANY = re.compile(r"-\d+-of-(?!0*1\.)\d+\.safetensors$")


@dataclass(frozen=True)
class OpenFile:
    """One file of a checkpoint, held by descriptor."""

    name: str
    fd: int
    stamp: Stamp
    reader: TensorReader
    digest: RunningDigest


class OpenCheckpoint:
    """A checkpoint held open. Close it, or use it as a context manager."""

    def __init__(self, kind: str, files: Sequence[OpenFile], sidecars: Sequence[OpenFile], closing: ExitStack) -> None:
        self.kind = kind
        self.files = files
        self._sidecars = sidecars
        self._closing = closing
        self.tensors = Checkpoint(
            [file.reader for file in files],
            {file.name.removesuffix(".safetensors"): file.reader for file in sidecars},
        )

    @property
    def size_bytes(self) -> int:
        return sum(file.reader.header.size for file in (*self.files, *self._sidecars))

    def identity(self) -> str:
        """The sha256 that stands for this checkpoint; reads what has not been read yet."""
        return identity({file.name: file.reader.sha256() for file in (*self.files, *self._sidecars)})

    def sync(self) -> None:
        """Makes the checkpoint's own bytes durable: whoever dropped it may not have."""
        for file in (*self.files, *self._sidecars):
            durable.sync(file.fd)

    def unchanged(self) -> bool:
        """True while no file has been written to, renamed or replaced since it was opened."""
        return all(stamp(os.fstat(file.fd)) == file.stamp for file in (*self.files, *self._sidecars))

    def close(self) -> None:
        self._closing.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_checkpoint(
    folder_fd: int, name: str, *, follow: bool = False, needs: Sequence[str] = (), watch: Watch = SILENT
) -> OpenCheckpoint:
    """Opens the checkpoint `name` in the folder `folder_fd`, with the sidecars it must bring.

    `follow`: symbolic links are followed; only for paths that the person names, never in the inbox.
    """
    with ExitStack() as closing:
        fd = _open(folder_fd, name, follow, closing)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            if SHARD_OF_MANY.search(name):
                raise Refused(
                    Reason.INCOMPLETE,
                    f"{shown(name)} is one shard of several",
                    f"drop the folder that holds all shards and {INDEX}",
                )
            opened = OpenCheckpoint("file", [_weights(fd, name, watch)], _no_sidecars(needs), closing)
        else:
            opened = _open_folder(fd, follow, needs, watch, closing)
        opened._closing = closing.pop_all()
        return opened


def open_path(path: Path, watch: Watch = SILENT, *, follow: bool = True) -> OpenCheckpoint:
    """Opens a checkpoint that the person names; `follow`: through symbolic links. Raises Refused or NotYet."""
    named = Path(os.path.abspath(path))  # noqa: PTH100 - a link keeps its own name: in a hub's cache its target has none
    parent = os.open(named.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return open_checkpoint(parent, named.name, follow=follow, watch=watch)
    finally:
        os.close(parent)


def _open_folder(fd: int, follow: bool, needs: Sequence[str], watch: Watch, closing: ExitStack) -> OpenCheckpoint:
    names = set(os.listdir(fd))
    sidecar_names = [f"{need}.safetensors" for need in needs]
    plain = sorted(n for n in names if n.endswith(".safetensors") and n not in sidecar_names and not n.startswith("."))

    def opened(name: str) -> OpenFile:
        return _weights(_open(fd, name, follow, closing), name, watch)

    if WEIGHTS in names:
        files, kind = [opened(WEIGHTS)], "folder"
    elif INDEX in names:
        files, kind = _shards(_read_index(_open(fd, INDEX, follow, closing)), names, opened), "sharded"
    elif ADAPTER in names:
        raise Refused(
            Reason.ADAPTER,
            "this is a LoRA adapter, not a whole model",
            "merge it into the base first (peft: model.merge_and_unload()) and drop the result",
        )
    elif len(plain) == 1 and not SHARD_OF_MANY.search(plain[0]):
        files, kind = [opened(plain[0])], "folder"
    elif not plain and any(name.endswith(PICKLE_SUFFIXES) for name in names):
        # not yet: what trainers save beside the weights is pickled too, and may come first
        raise NotYet(Reason.PICKLE, "the folder holds pickled weights only", PICKLE_HINT)
    else:
        raise NotYet(
            Reason.NO_WEIGHTS,
            f"the folder has neither {WEIGHTS} nor {INDEX}",
            "save the model with save_pretrained(..., safe_serialization=True)",
        )
    for sidecar in sidecar_names:
        if sidecar not in names:
            raise NotYet(Reason.MISSING_SIDECAR, f"{sidecar} is missing", "this home's method needs it: see the docs")
    return OpenCheckpoint(kind, files, [opened(sidecar) for sidecar in sidecar_names], closing)


def _shards(weight_map: dict[str, str], names: set[str], opened: Callable[[str], OpenFile]) -> list[OpenFile]:
    for shard in weight_map.values():
        if not SHARD_NAME.fullmatch(shard) or shard in (".", "..") or not shard.endswith(".safetensors"):
            raise _bad_index(f"{shown(shard)} cannot be the name of a shard")
    wanted = sorted(set(weight_map.values()))
    missing = [shard for shard in wanted if shard not in names]
    if missing:
        raise NotYet(
            Reason.INCOMPLETE,
            f"shard {shown(missing[0])} is missing ({len(missing)} of {len(wanted)})",
            "copy every shard",
        )
    files = [opened(shard) for shard in wanted]
    found = {name: file.name for file in files for name in file.reader.specs}
    for name in found.keys() | weight_map.keys():
        if found.get(name) != weight_map.get(name):
            raise _bad_index(f"the index places {shown(name)} in {weight_map.get(name)}, it is in {found.get(name)}")
    return files


def _read_index(fd: int) -> dict[str, str]:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise _not_a_file(INDEX)
    size = os.fstat(fd).st_size
    if size > MAX_INDEX_BYTES:
        raise _bad_index(f"it has {size} bytes")
    try:
        index: Any = json.loads(os.pread(fd, size, 0))
    except (ValueError, RecursionError):
        raise NotYet(Reason.BAD_INDEX, f"{INDEX} is not JSON", "copy it again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise _bad_index("it has no weight_map of names")
    return weight_map


def _open(folder_fd: int, name: str, follow: bool, closing: ExitStack) -> int:
    """Opens a regular file or a folder by one path component; anything else is refused without touching it."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    try:
        # looked at before it is opened: opening a device can have effects of its own
        mode = os.stat(name, dir_fd=folder_fd, follow_symlinks=follow).st_mode
        if stat.S_ISLNK(mode):
            raise _symlink(name)
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise _not_a_file(name)
        fd = os.open(name, flags, dir_fd=folder_fd)
    except FileNotFoundError:
        raise NotYet(Reason.CHANGED, f"{shown(name)} is no longer there", "nothing to do, if you moved it") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _symlink(name) from None
        if error.errno in (errno.EACCES, errno.EPERM):
            raise Refused(
                Reason.UNREADABLE, f"{shown(name)} cannot be read: {error.strerror}", "make it readable for the daemon"
            ) from None
        if error.errno in (errno.ENXIO, errno.ENODEV):
            raise _not_a_file(name) from None
        raise
    closing.callback(os.close, fd)
    if not (stat.S_ISREG(os.fstat(fd).st_mode) or stat.S_ISDIR(os.fstat(fd).st_mode)):
        raise _not_a_file(name)
    return fd


def _weights(fd: int, name: str, watch: Watch) -> OpenFile:
    """A .safetensors file by descriptor, its header checked."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise _not_a_file(name)
    before = stamp(os.fstat(fd))
    opening = os.pread(fd, len(LFS_OPENING), 0)
    if opening == LFS_OPENING:
        raise Refused(
            Reason.LFS_POINTER,
            f"{shown(name)} is a git-lfs pointer, not the file it stands for",
            "run `git lfs pull` where it came from and drop the file itself",
        )
    if name.endswith(PICKLE_SUFFIXES) or opening.startswith(PICKLE_OPENINGS):
        raise _pickle(f"{shown(name)} is pickled, which can run code when it is loaded")
    if not name.endswith(".safetensors"):
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
        raise


def _no_sidecars(needs: Sequence[str]) -> list[OpenFile]:
    if needs:
        raise Refused(
            Reason.MISSING_SIDECAR,
            f"{needs[0]}.safetensors is missing, which this home's method needs",
            "drop a folder with the weights and this file in it",
        )
    return []


def _symlink(name: str) -> Refused:
    return Refused(Reason.SYMLINK, f"{shown(name)} is a symbolic link", "drop the file itself (cp -L follows links)")


def _not_a_file(name: str) -> Refused:
    return Refused(Reason.NOT_A_FILE, f"{shown(name)} is neither a file nor a folder", "drop a .safetensors file")


def _pickle(detail: str) -> Refused:
    return Refused(Reason.PICKLE, detail, PICKLE_HINT)


def _bad_index(detail: str) -> Refused:
    return Refused(Reason.BAD_INDEX, f"{INDEX}: {detail}", "save the model again with save_pretrained")
