"""What is only asked of a checkpoint that arrives: is it the only one in its folder, and was all of it written?"""

import os
import re
from collections.abc import Iterator

from daemon.checkpoint import PICKLE_HINT, PICKLE_SUFFIXES, OpenCheckpoint
from daemon.errors import NotYet, Reason
from daemon.inbox import READY_MARKER
from projector.text import listed, shown

PART_OF_MANY = re.compile(r"-\d+-of-\d+$")


def check_arrival(expert: OpenCheckpoint) -> None:
    """Raises NotYet where the folder holds another checkpoint of the same model, in another layout (which of them was
    trained last, nobody said), or where a file was never written in places: its space was reserved.
    """
    used = {file.name for file in expert.files}
    if beside := sorted(_rivals(used, expert.names)):
        one, other = listed(sorted(used), most=2), listed(beside, most=2)
        pickled = any(name.endswith(PICKLE_SUFFIXES) for name in beside)
        raise NotYet(
            Reason.AMBIGUOUS,
            f"the folder holds two checkpoints: {one}, and {other}",
            f"take the older one out of the folder, {one} or {other}, and drop it again"
            + (f"; where {other} is to stay, {PICKLE_HINT}" if pickled else ""),
        )
    if READY_MARKER not in expert.names:
        for file in expert.every_file:
            if (hole := _hole(file.fd, file.reader.header.size)) is not None:
                raise NotYet(
                    Reason.INCOMPLETE,
                    f"{shown(file.name)} was never written at byte {hole} (and elsewhere?): its space is only reserved",
                    "let the copy finish, or copy it again; if it is whole all the same, cp --sparse=never, or drop it"
                    f" in a folder with an empty file {READY_MARKER}",
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


def _hole(fd: int, size: int) -> int | None:
    """Where the file has its first hole, if it has one, as far as its file system knows."""
    try:
        hole = os.lseek(fd, 0, os.SEEK_HOLE)
    except OSError:
        return None
    return hole if hole < size else None
