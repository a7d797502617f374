"""What is only asked of a checkpoint that arrives: is it the only one in its folder, and was all of it written?"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from daemon.checkpoint import PICKLE_SUFFIXES, OpenCheckpoint, convert_hint
from daemon.errors import NotYet, Reason
from daemon.inbox import READY_MARKER
from projector.text import EXPERT, NEW, listed, shown

PART_OF_MANY = re.compile(r"-\d+-of-\d+$")


def check_arrival(expert: OpenCheckpoint) -> None:
    """Raises NotYet where the folder holds another checkpoint of the same model, in another layout (which of them was
    trained last, nobody said), or where a file was never written in places: its space was reserved.
    """
    used = {file.name for file in expert.files}
    if beside := sorted(_rivals(used, expert.names)):
        raise NotYet(Reason.AMBIGUOUS, *_told_apart(expert, used, beside))
    if READY_MARKER not in expert.names:
        for file in expert.every_file:
            if (hole := _hole(file.fd, file.reader.header.size)) is not None:
                raise NotYet(
                    Reason.INCOMPLETE,
                    f"{shown(file.name)} was never written at byte {hole} (and elsewhere?): its space is only reserved",
                    "let the copy finish, or copy it again; if it is whole all the same: cp -r --sparse=never"
                    f" {EXPERT} {NEW}, or drop it in a folder with an empty file {READY_MARKER}",
                )


def _rivals(used: set[str], names: frozenset[str]) -> Iterator[str]:
    """Files of the same model in another layout. Shards that the index does not name are no model without it."""
    own = [name.removesuffix(".safetensors") for name in used]
    stems = {PART_OF_MANY.sub("", stem) for stem in own}
    stems |= {"pytorch_model"} if "model" in stems else set()
    sharded = any(map(PART_OF_MANY.search, own))
    for name in names - used:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122 - a name, not a path
        whole = PART_OF_MANY.sub("", stem)
        other = suffix == ".safetensors" and not (sharded and whole != stem)
        if whole in stems and (other or suffix in PICKLE_SUFFIXES):
            yield name


def _told_apart(expert: OpenCheckpoint, used: set[str], beside: Sequence[str]) -> tuple[str, str]:
    """That there are two checkpoints, and what to do: which names belong to which, and when each was written, where
    their files still say it. A copy gives all of them the time of the copy."""
    one, other = (_files(group, expert.names) for group in (used, beside))
    mine, theirs = (_written(group, expert.folder) for group in (used, beside))
    detail = f"the folder holds two checkpoints: {one} (of {mine}), and {other} (of {theirs})"
    if mine != theirs:
        older = one if mine < theirs else other
        hint = f"take the older one out of {EXPERT}: that is {older}, unless a copy gave them their times; and drop it"
    else:
        hint = (
            f"take the older one out of {EXPERT}: either {one}, or {other}. Their times do not tell, as after a copy:"
            " `ls -l` them where they came from, or go by the names that the training writes; and drop it"
        )
    pickle = next((name for name in beside if name.endswith(PICKLE_SUFFIXES)), None)
    if pickle is None:
        return detail, f"{hint} again"
    return detail, f"{hint} again; where {other} is to stay, take {one} out, then {convert_hint()}"


def _files(group: Iterable[str], there: Iterable[str]) -> str:
    """The files of one of the two and their index, as many shards as there are in one word."""
    stems = {PART_OF_MANY.sub("", Path(name).stem) for name in group if PART_OF_MANY.search(Path(name).stem)}
    index = [name for name in there if name.endswith(".index.json") and name.partition(".")[0] in stems]
    return listed(dict.fromkeys(re.sub(r"-\d+-of-", "-*-of-", name) for name in (*sorted(group), *sorted(index))))


def _written(group: Iterable[str], folder: int | None) -> datetime:
    """When the last of them was written, in whole seconds. Raises NotYet where one of them is gone."""
    try:
        last = max(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime for name in group)
    except OSError:
        raise NotYet(Reason.CHANGED, "one of its files is no longer there", "nothing to do, if you moved it") from None
    return datetime.fromtimestamp(int(last), UTC)


def _hole(fd: int, size: int) -> int | None:
    """Where the file has its first hole, if it has one, as far as its file system knows."""
    try:
        hole = os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError:
        return None
    return hole if hole < size else None
