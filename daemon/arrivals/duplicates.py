"""What becomes of a duplicate's bytes: the archive has them already, and keeps them once."""

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from daemon.checkpoints.checkpoint import open_path
from daemon.checkpoints.nesting import DEEPEST
from daemon.disk import durable
from daemon.errors import DaemonError
from daemon.layout import Home
from projector.errors import ProjectorError
from projector.files.tensorfile import TensorReader
from projector.watch import SILENT, Watch
from registry.reader import Reader
from registry.records import Expert, Status

Tensors = set[tuple[str, tuple[int, ...], str]]
"""Of each tensor its dtype, shape and sha256."""


def spare(home: Home, reader: Reader, expert: Expert, watch: Watch = SILENT) -> None:
    """Removes the weights of a duplicate from archive/<id>/: each file of which every tensor is in its twin's files,
    as long as those are what was merged. All of them are read for that. What the drop brought besides stays.

    Where the twin's files are gone, they take their place, if a rebuild could not tell the two apart. Repeatable, and
    after a crash, or where `watch` put an end to the reading, the rest goes.
    """
    twin = reader.expert(expert.duplicate_of) if expert.duplicate_of else None
    own = home.archived(expert.id)
    if own is None or twin is None:
        return
    kept = home.archived(twin.id) or next(iter(home.quarantined(twin.id)), None)
    if kept is not None:
        _remove(own, _held_twice(own, kept, twin, watch))
    elif _stands_for(expert, twin):
        folder = home.archive(twin.id)
        durable.make_folder(folder)
        durable.sync_folder(folder.parent)
        durable.rename_new(own, folder / own.name)


def _held_twice(own: Path, kept: Path, twin: Expert, watch: Watch) -> list[Path]:
    """The files of `own` with nothing in them that is not in the twin's too."""
    try:
        files = list(_weights(own)) if own.is_dir() else [own]
        with open_path(kept, watch, follow=False) as archived:
            archived.digest_tensors()
            if archived.identity() != twin.sha256:
                return []
            there = _tensors(file.reader for file in archived.files)
        return [path for path in files if _tensors_in(path, watch) <= there]
    except (DaemonError, ProjectorError, OSError):
        return []  # a file that cannot be read now is no reason to remove another


def _weights(folder: Path, levels: int = DEEPEST) -> Iterator[Path]:
    """The weights in a folder, and in those below it where a checkpoint may lie. No link is followed: what lies behind
    one may be the twin itself.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            yield path
        elif levels and path.is_dir() and not path.is_symlink():
            yield from _weights(path, levels - 1)


def _tensors_in(path: Path, watch: Watch) -> Tensors:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return (
            _tensors([TensorReader(fd, watch=watch)]) if stat.S_ISREG(os.fstat(fd).st_mode) else {("", (), "no file")}
        )
    finally:
        os.close(fd)


def _tensors(readers: Iterable[TensorReader]) -> Tensors:
    specs = ((reader, spec) for reader in readers for spec in reader.specs.values())
    return {(str(spec.dtype), spec.shape, reader.tensor_sha256(spec.name)) for reader, spec in specs}


def _remove(own: Path, files: list[Path]) -> None:
    """Removes these files, and the folders that are empty then."""
    for path in files:
        _try_to_remove(path)
    above = {folder for path in files for folder in path.parents if folder.is_relative_to(own)}
    for folder in sorted(above | ({own} if own.is_dir() else set()), reverse=True):  # the inner ones first
        durable.sync_folder(folder)
        if not any(folder.iterdir()):
            _try_to_remove(folder)
    durable.sync_folder(own.parent)


def _try_to_remove(path: Path) -> None:
    with suppress(PermissionError):  # of another owner, or immutable: to spare room is a favour, no duty
        durable.remove(path)


def _stands_for(expert: Expert, twin: Expert) -> bool:
    """True where a rebuild takes the one for the other: the same files, sidecars and weight."""
    theirs, sidecars = dict(twin.sidecars or {}), dict(expert.sidecars or {})
    alike = expert.sha256 == twin.sha256 and expert.weight == twin.weight
    return alike and twin.status is Status.MERGED and theirs.items() <= sidecars.items()
