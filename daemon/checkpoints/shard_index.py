"""The index of a checkpoint in shards: which file holds which tensor. Whatever it says is checked before it is used.

That of pickled shards is the same but for its name, and for those of the shards.
"""

import json
import os
import re
import stat
from collections.abc import Collection, Mapping
from typing import Any

from daemon.checkpoints.opening import not_a_file
from daemon.checkpoints.weight_names import INDEX
from daemon.errors import NotYet, Reason, Refused
from projector.text import listed, shown

MAX_INDEX_BYTES = 16 << 20
SHARD_NAME = re.compile(r"[A-Za-z0-9._-]+")


def read_index(fd: int, name: str = INDEX) -> dict[str, str]:
    """The weight_map of the index `name`, tensor -> file. Raises Refused, or NotYet where it may only be unfinished."""
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise not_a_file(name)
    size = os.fstat(fd).st_size
    if size > MAX_INDEX_BYTES:
        raise _bad_index(name, f"it has {size} bytes")
    try:
        index: Any = json.loads(os.pread(fd, size, 0))
    except (ValueError, RecursionError):
        raise NotYet(Reason.BAD_INDEX, f"{name} is not JSON", "copy it again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise _bad_index(name, "it has no weight_map of names")
    return weight_map


def shard_names(
    weight_map: Mapping[str, str], there: Collection[str], name: str = INDEX, suffix: str = ".safetensors"
) -> list[str]:
    """The files that the index `name` names, which end in `suffix` and must all be `there`.

    Raises Refused, or NotYet where one is missing.
    """
    for shard in weight_map.values():
        if not SHARD_NAME.fullmatch(shard) or shard in (".", "..") or not shard.endswith(suffix):
            raise _bad_index(name, f"{shown(shard)} cannot be the name of a shard")
    wanted = sorted(set(weight_map.values()))
    missing = [shard for shard in wanted if shard not in there]
    if missing:
        others = any(file.endswith(suffix) and file not in wanted for file in there)
        raise NotYet(
            Reason.INCOMPLETE,
            f"{len(missing)} of {len(wanted)} shards are missing: {listed(missing)}",
            "copy every shard" + (f"; if {name} is of another save, write the index again" if others else ""),
        )
    return wanted


def check_places(weight_map: Mapping[str, str], found: Mapping[str, str], index: str = INDEX) -> None:
    """Raises Refused where a tensor was found in another file than the index says."""
    for name in found.keys() | weight_map.keys():
        if found.get(name) != weight_map.get(name):
            where = f"the index places {shown(name)} in {weight_map.get(name)}, it is in {found.get(name)}"
            raise _bad_index(index, where)


def _bad_index(name: str, detail: str) -> Refused:
    return Refused(Reason.BAD_INDEX, f"{name}: {detail}", "save the model again with save_pretrained")
