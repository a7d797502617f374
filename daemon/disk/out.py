"""OUT, what a command makes for a person: whether it can be made, and its making. A module of its own: convert, zipit
and export, which share no more than that, say it alike.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from daemon.disk import durable
from daemon.errors import BadConfig


def new_out(out: Path, files: Collection[str]) -> Path:
    """`out` as a whole path, of which nothing is there. files: the suffixes that are no folder's, where it is to be
    one. Raises BadConfig.
    """
    out = Path(os.path.abspath(out))  # noqa: PTH100 - a link keeps its own name
    if os.path.lexists(out):
        raise BadConfig(f"{out} is there already", "name one that does not exist")
    if out.suffix in files:
        raise BadConfig(f"{out.name} would be a folder", f"call it {quote(str(out.with_suffix('')))}")
    if not out.parent.is_dir():
        if wrong := in_the_way(out.parent):
            raise BadConfig(f"{wrong} is no folder: nothing can be made in it", "name a place in one")
        raise BadConfig(f"the folder {out.parent} does not exist", f"make it first: mkdir -p {quote(str(out.parent))}")
    return out


def in_the_way(folder: Path) -> Path | None:
    """What is there instead of a folder, at this path or above it, so that none can be made."""
    return next((one for one in (folder, *folder.parents) if os.path.lexists(one) and not one.is_dir()), None)


@contextmanager
def making(out: Path, *, alone: bool = False) -> Iterator[Path]:
    """A new folder, to be filled, that is `out` afterwards, as `durable.appearing` has it. Raises BadConfig where
    something is there by then, as what another run of the same has made.
    """
    try:
        with durable.appearing(out, alone=alone) as folder:
            yield folder
    except FileExistsError as error:
        if not os.path.lexists(out):
            raise
        raise BadConfig(
            f"{out} has come to be meanwhile, by another run or by hand: it stays as it is, and nothing else was made",
            f"use it, if another run of the same made it; else name another, or remove it (rm -r {quote(str(out))})"
            " and run this again",
        ) from error
