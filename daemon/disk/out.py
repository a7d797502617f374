"""OUT, what a command makes for a person: whether it can be made. A module of its own: convert, zipit and export, which
share no more than that, say it alike.
"""

import os
from collections.abc import Collection
from pathlib import Path
from shlex import quote

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
        if wrong := next((one for one in reversed(out.parents) if os.path.lexists(one) and not one.is_dir()), None):
            raise BadConfig(f"{wrong} is no folder: nothing can be made in it", "name a place in one")
        raise BadConfig(f"the folder {out.parent} does not exist", f"make it first: mkdir -p {quote(str(out.parent))}")
    return out
