"""Converts pickled checkpoints to safetensors: one confined process for each file, whose work is checked and published.

What is pickled is read by that process alone (unpickling.py). It gets two descriptors and nothing else: the file, and a
new one to write. This side believes nothing that comes back: it reads the header of what was written by the
strict rules for any expert, hashes it, makes it durable, and lets it appear under its name at once, or not at all.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from time import monotonic
from typing import Any

from daemon.arrivals.inbox import check_finished
from daemon.checkpoints.adapter_config import ADAPTER, ADAPTER_WEIGHTS
from daemon.checkpoints.checkpoint import PICKLE_SUFFIXES, PICKLED, PICKLED_ADAPTER, PICKLED_INDEX, SIDECARS
from daemon.checkpoints.expert_json import ABOUT
from daemon.checkpoints.opening import open_entry
from daemon.checkpoints.shard_index import read_index, shard_names
from daemon.checkpoints.weight_names import INDEX, WEIGHTS
from daemon.convert.confining import Options, Told, unpickle
from daemon.disk import durable
from daemon.disk.out import making, new_out
from daemon.errors import Reason, Refused
from daemon.versions.companions import companions
from projector.errors import ProjectorError
from projector.files.source import identity
from projector.files.tensorfile import RunningDigest, TensorReader
from projector.spec import Schema
from projector.text import listed, shown

SUFFIX = ".safetensors"

Report = Callable[[str, int, int], None]
"""Hears how far it is: the file's name, the bytes that are written, and of how many (0 while it is being loaded)."""


@dataclass(frozen=True)
class Converted:
    """What was done. sha256: that of the weights as the lineage would have it; `files` has each file's own.

    inside: under which key of the pickle the weights were. stripped: how many names had the prefix.
    """

    out: str
    sha256: str
    size_bytes: int
    tensors: int
    dtypes: dict[str, int]
    inside: str
    stripped: int
    shared: list[dict[str, Any]]
    left_out: list[dict[str, str]]
    files: list[dict[str, str]]
    copied: list[str]
    seconds: float


@dataclass(frozen=True)
class _Part:
    """One pickled file, held by descriptor, and the name of what it becomes."""

    name: str
    fd: int
    target: str


@dataclass(frozen=True)
class _Done:
    """One converted file: its header's specs, its digest, and what the process reported."""

    part: _Part
    specs: Schema
    sha256: str
    told: Told


def convert(
    source: Path,
    out: Path,
    options: Options = Options(),  # noqa: B008
    report: Report = lambda *_: None,
) -> Converted:
    """Converts a pickled file, or a folder with pytorch_model.bin or its shards, to `out`: a .safetensors file, or a
    folder, which gets the configuration and the tokenizer too.

    `out` must not exist; it appears whole or not at all. Raises BadConfig, Refused, NotYet, BadFile or OSError.
    """
    started = monotonic()
    source = Path(os.path.abspath(source))  # noqa: PTH100 - a link keeps its own name
    out = new_out(out, PICKLE_SUFFIXES)
    with ExitStack() as closing:
        parts, beside, weight_map = _plan(source, closing)
        check_finished(source)
        whole = out.suffix != SUFFIX
        if not whole and len(parts) > 1:
            raise Refused(
                Reason.CONVERT,
                f"{shown(source.name)} has {len(parts)} shards",
                f"let it become a folder: {quote(str(out.with_suffix('')))}",
            )
        if not whole:
            beside, parts = [], [replace(parts[0], target=out.name)]
        folder = closing.enter_context(making(out, alone=not whole))
        done = [_converted(part, folder, options, report) for part in parts]
        if options.strip_prefix and not any(one.told.stripped for one in done):
            raise Refused(
                Reason.CONVERT, f"no tensor's name begins with {shown(options.strip_prefix)}", "mend --strip-prefix"
            )
        if weight_map is not None:
            _write_index(folder, done, {name.removeprefix(options.strip_prefix) for name in weight_map})
        for path in beside:
            durable.make_folder((folder / path).parent, public=True)
            durable.copy_file(source / path, folder / path)
    return _summary(out, done, [str(path) for path in beside], monotonic() - started)


def _plan(source: Path, closing: ExitStack) -> tuple[list[_Part], list[Path], dict[str, str] | None]:
    """(the pickled files, the paths in the folder of what is copied beside them, the index's weight_map if any)."""
    if not os.path.lexists(source):
        raise Refused(Reason.CONVERT, f"{source} does not exist", "name a pickled file, or a folder")
    parent = os.open(source.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    closing.callback(os.close, parent)
    fd = open_entry(parent, source.name, True, closing)
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return [_Part(source.name, fd, WEIGHTS)], [], None
    names = set(os.listdir(fd))

    def part(name: str, target: str) -> _Part:
        opened = open_entry(fd, name, True, closing)
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            raise Refused(Reason.NOT_A_FILE, f"{shown(name)} is a folder", "name the file that holds the weights")
        return _Part(name, opened, target)

    weight_map = None
    if WEIGHTS in names or INDEX in names:
        raise Refused(Reason.CONVERT, f"{shown(source.name)} has its weights as safetensors", "drop it as it is")
    if PICKLED_INDEX in names:
        weight_map = read_index(part(PICKLED_INDEX, "").fd, PICKLED_INDEX)
        parts = [part(shard, _target(shard)) for shard in _shards(weight_map, names)]
    elif PICKLED in names:
        parts = [part(PICKLED, WEIGHTS)]
    elif PICKLED_ADAPTER in names:
        parts = [part(PICKLED_ADAPTER, ADAPTER_WEIGHTS)]
    else:
        raise Refused(
            Reason.NO_WEIGHTS,
            f"{shown(source.name)} has no {PICKLED}, {PICKLED_INDEX} or {PICKLED_ADAPTER}",
            "name the file that holds the weights",
        )
    more = {ABOUT, ADAPTER, *(f"{kind}{SUFFIX}" for kind in SIDECARS)} & names
    for name in more:  # a FIFO would keep us waiting
        part(name, "")
    beside = companions(source, [one.name for one in parts]).files
    return parts, [Path(name) for name in (*beside, *sorted(more))], weight_map


def _shards(weight_map: Mapping[str, str], names: set[str]) -> list[str]:
    shards = shard_names(weight_map, names, PICKLED_INDEX, suffix="")
    targets = {_target(shard) for shard in shards}
    if len(targets) < len(shards) or (WEIGHTS in targets and len(shards) > 1):  # which would pass for all of them
        raise Refused(Reason.BAD_INDEX, f"{PICKLED_INDEX} has shards of one name", "save the model again")
    return shards


def _target(shard: str) -> str:
    """The name of a shard once it is safetensors: model-00001-of-00002.safetensors."""
    return f"{Path(shard.removeprefix('pytorch_')).stem}{SUFFIX}"


def _write_index(folder: Path, done: Sequence[_Done], listed_names: set[str]) -> None:
    """Writes the index of what was found. Raises Refused where the old one promises what no shard holds."""
    found: dict[str, str] = {}
    for one in done:
        for name in one.specs:
            if name in found:
                raise Refused(Reason.BAD_INDEX, f"two shards hold {shown(name)}", "save the model again")
            found[name] = one.part.target
    if missing := sorted(listed_names - found.keys()):
        raise Refused(
            Reason.BAD_INDEX, f"no shard holds {listed(missing)}, which {PICKLED_INDEX} lists", "copy every shard"
        )
    total = sum(spec.nbytes for one in done for spec in one.specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(found.items()))}
    durable.write_file(folder / INDEX, json.dumps(index, indent=2).encode())


def _converted(part: _Part, folder: Path, options: Options, report: Report) -> _Done:
    """Has one file converted, checks what came of it and makes it durable. Every error bears the file's name."""
    report(part.name, 0, 0)
    try:
        with durable.new_file(folder / part.target) as fd:
            told = unpickle(part.fd, fd, options, lambda done, total: report(part.name, done, total))
            digest = RunningDigest(fd)
            reader = TensorReader(fd, digest)
            sha256 = digest.finish(reader.header.size)
    except (Refused, ProjectorError) as error:
        error.args = (f"{shown(part.name)}: {error}",)
        raise
    return _Done(part, reader.specs, sha256, told)


def _summary(out: Path, done: Sequence[_Done], copied: list[str], seconds: float) -> Converted:
    specs = [spec for one in done for spec in one.specs.values()]
    return Converted(
        out=str(out),
        sha256=identity({one.part.target: one.sha256 for one in done}),
        size_bytes=sum(spec.nbytes for spec in specs),
        tensors=len(specs),
        dtypes=dict(Counter(str(spec.dtype).removeprefix("torch.") for spec in specs)),
        inside=done[0].told.inside,
        stripped=sum(one.told.stripped for one in done),
        shared=[group for one in done for group in one.told.shared],
        left_out=[entry for one in done for entry in one.told.left_out],
        files=[
            {"name": one.part.target, "of": one.part.name, "kind": one.told.kind, "sha256": one.sha256} for one in done
        ],
        copied=copied,
        seconds=seconds,
    )
