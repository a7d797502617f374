"""What is only asked of a checkpoint that arrives: is it the only one in its folder, and was all of it written?"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from daemon.checkpoints.adapter_config import ADAPTER, check_no_factors
from daemon.checkpoints.checkpoint import PICKLE_SUFFIXES, SIDECARS, OpenCheckpoint, convert_hint
from daemon.checkpoints.opening import READY_MARKER, open_entry
from daemon.checkpoints.weight_names import FIRST, SUFFIX
from daemon.errors import DaemonError, NotYet, Reason
from projector.errors import ProjectorError
from projector.files.tensorfile import TensorReader
from projector.spec import Schema, TensorSpec
from projector.text import EXPERT, NEW, listed, shown

PART_OF_MANY = re.compile(r"-\d+-of-\d+$")
USUAL = frozenset((*FIRST, "pytorch_model", "adapter_model", "adapters", "pytorch_lora_weights"))
"""What libraries call the weights of a model or an adapter: a checkpoint, whatever is in it."""
BESIDE = re.compile(
    rf"\..*|{'|'.join(SIDECARS)}"
    r"|consolidated(\.\d+)?"  # Mistral's repositories have the same weights once more, in names of their own
    r"|optim.*"  # its moments have the shapes of the weights
    r"|\d+_adapters"  # mlx's checkpoints
)
"""What others are called that lie beside a checkpoint by custom."""
VARIANT = re.compile(r"(?P<name>.+)\.(fp16|fp32|bf16|fp8|int8|int4|non_ema)")


def check_arrival(expert: OpenCheckpoint, base: Schema) -> None:
    """Raises NotYet where the folder holds another checkpoint of the same model (which of them was trained last, nobody
    said), or where a file was never written in places: its space was reserved.
    """
    if beside := sorted(_rivals(expert, base)):
        used = {file.name for file in expert.files} | ({ADAPTER} if expert.kind == "adapter" else set())
        raise NotYet(Reason.AMBIGUOUS, *_told_apart(expert, used, beside))
    if READY_MARKER not in expert.names:
        for file in expert.every_file:
            if (hole := _hole(file.fd, file.reader.header.size)) is not None:
                raise NotYet(
                    Reason.INCOMPLETE,
                    f"{shown(file.name)} was never written at byte {hole} (and elsewhere?): its space is only reserved",
                    "let the copy finish, or copy it again; if it is whole all the same: `cp -r --sparse=never"
                    f" {EXPERT} {NEW}`, or drop it in a folder with an empty file {READY_MARKER}",
                )


def _rivals(expert: OpenCheckpoint, base: Schema) -> Iterator[str]:
    """Files of another checkpoint, in another layout or by another name. Shards that the index does not name are no
    model without it, a variant (fp16) is the same weights once more, and files of another model are nobody's rivals.
    """
    used = {file.name for file in expert.files}
    own = [os.path.splitext(name)[0] for name in used]  # noqa: PTH122 - names, no paths
    stems = {PART_OF_MANY.sub("", stem) for stem in own}
    sharded = any(map(PART_OF_MANY.search, own))
    alike = _like(base, expert.tensors.schema)
    for name in expert.names - {file.name for file in expert.every_file}:
        stem, suffix = os.path.splitext(name)  # noqa: PTH122
        whole = PART_OF_MANY.sub("", stem)
        known = whole in stems | USUAL
        variant, left_over = VARIANT.fullmatch(whole), sharded and whole in stems and whole != stem
        by_custom = BESIDE.fullmatch(whole) or (variant and variant["name"] in stems)
        if suffix in PICKLE_SUFFIXES and known:
            yield name
        elif suffix != SUFFIX or by_custom or left_over:
            continue
        elif known or (specs := _header(expert, name)) is None or alike(specs):
            yield name


def _header(expert: OpenCheckpoint, name: str) -> Mapping[str, TensorSpec] | None:
    """What a file beside the expert holds by its header; None where that is an adapter, or where nobody knows what it
    is, or will be once it is written.
    """
    assert expert.folder is not None, "a file has nothing beside it"
    with ExitStack() as closing:
        try:
            fd = open_entry(expert.folder, name, False, closing)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                return {}
            specs = TensorReader(fd).specs
            check_no_factors(specs, name, in_folder=True)
        except (DaemonError, ProjectorError):
            return None
        return specs


def _like(base: Schema, expert: Schema) -> Callable[[Schema], bool]:
    """A question about other tensors: are they of such a model? True where one of them is the base's or the expert's by
    name and shape, and where at least half of the matrices have shapes of the base's, whatever they are called.
    """
    ours = {**base, **expert}
    shapes = {spec.shape for spec in base.values() if not spec.vector}

    def alike(specs: Schema) -> bool:
        found = [spec.shape in shapes for spec in specs.values() if not spec.vector]
        same = any(spec.shape == ours[name].shape for name, spec in specs.items() if name in ours)
        return same or 0 < len(found) <= 2 * sum(found)

    return alike


def _told_apart(expert: OpenCheckpoint, used: set[str], beside: Sequence[str]) -> tuple[str, str]:
    """That there are two checkpoints, and what to do: which names belong to which, and when each was written, where
    their files still say it. A copy gives all of them the time of the copy."""
    one, other = (_files(group, expert.names) for group in (used, beside))
    mine, theirs = (_written(group, expert.folder) for group in (used, beside))
    detail = f"the folder holds two checkpoints: {one} (of {mine}), and {other} (of {theirs})"
    if mine == theirs:
        told = (
            "their times do not tell, as after a copy: `ls -l` them where they came from, or go by the names that the"
            " training writes"
        )
    else:
        told = f"the older one is {one if mine < theirs else other}, unless a copy gave them their times"
    hint = f"take what is not to be merged out of {EXPERT}, {one} or {other} ({told}), and drop it"
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
