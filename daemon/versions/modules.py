"""Modules of a model that lie in folders of their own, as 2_Dense of sentence-transformers does.

No merge reads them: every version has the base's. An expert that trained one is refused, for that would be lost.
"""

import os
from collections.abc import Iterable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote

from daemon.checkpoints.checkpoint import PICKLED
from daemon.checkpoints.opening import open_entry
from daemon.checkpoints.weight_names import SUFFIX, WEIGHTS
from daemon.errors import BadHome, Reason, Refused
from daemon.versions.checking import names_below
from daemon.versions.companions import modules_of
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader
from projector.text import shown


def check_modules(folder: int | None, base: Path) -> None:
    """Raises Refused where the expert in this folder, a descriptor, has another module than the base's folder has.

    Also BadFile where it cannot be read, and NotYet. folder: None of an expert that is a file.
    """
    if folder is None:
        return
    for name in names_below(base):
        if "/" in name and name.endswith(SUFFIX) and (there := _found(folder, name)):
            if there != name:
                _refuse(name, f"{there} is not safetensors")
            with ExitStack() as closing:
                theirs = _open(folder, name, closing)
                ours = TensorReader(closing.enter_context((base / name).open("rb")).fileno())
                if not _same(Checkpoint([ours]), Checkpoint([theirs])):
                    _refuse(name, f"{name} is not the base's")


def check_pickled(base: Path, there: Iterable[str]) -> None:
    """Raises BadHome where a module of the base has pickled weights alone, so that no version would load. there: the
    files of it that versions get.
    """
    whole = {name.rpartition("/")[0] for name in there if name.endswith(SUFFIX)}
    for path in sorted(base.glob(f"*/{PICKLED}")):
        below = path.parent.name
        if below not in whole and any(fnmatchcase(below, module) for module in modules_of(base)):
            raise BadHome(
                f"its module {shown(below)} has pickled weights, which no version could have",
                f"`mainstem convert {quote(str(path))} {quote(str(path.with_name(WEIGHTS)))}`",
            )


def _found(folder: int, name: str) -> str | None:
    """The module's weights as the expert has them: by the base's name for them, or pickled; None where it has none."""
    below = name.rpartition("/")[0]
    for one in (name, f"{below}/{PICKLED}"):
        try:
            os.stat(one, dir_fd=folder, follow_symlinks=False)
        except OSError:
            continue
        return one
    return None


def _open(folder: int, name: str, closing: ExitStack) -> TensorReader:
    for part in name.split("/"):
        folder = open_entry(folder, part, False, closing)
    return TensorReader(folder)


def _same(ours: Checkpoint, theirs: Checkpoint) -> bool:
    """True where every tensor is the base's, if need be rounded to the expert's dtype."""
    if ours.schema.keys() != theirs.schema.keys():
        return False
    pairs = ((ours.read(name), theirs.read(name)) for name in ours.schema)
    return all(a.shape == b.shape and a.to(b.dtype).equal(b) for a, b in pairs)


def _refuse(name: str, why: str) -> None:
    below = name.rpartition("/")[0]
    raise Refused(
        Reason.MODULE,
        f"{shown(why)}: no merge reads a module in a folder of its own, and what it learnt would be lost",
        f"freeze it while you train; to merge the rest alone, drop it again without the folder {below}",
    )
