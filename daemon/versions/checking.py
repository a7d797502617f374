"""A version as it lies on the disk: which files it has, what its manifest says, and whether both still agree."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from daemon.checkpoints.weight_names import WeightNames
from daemon.layout import MANIFEST, STATE_FILE, Home
from daemon.release import software_version
from projector.files.header import ALIGNMENT, build_header, room
from projector.spec import TensorSpec
from registry.records import Expert, Head, NewExpert, Version

METADATA = {"format": "pt"}  # what the stock loaders ask of a file
HASH_BYTES = 8 << 20


@dataclass(frozen=True)
class FileEntry:
    """A file of a version as its manifest lists it."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class WeightFile:
    """One weights file to be written: its name and its tensors, in the dtype they are published in."""

    name: str
    specs: Sequence[TensorSpec]


@dataclass(frozen=True)
class Withdrawal:
    """The experts that a version no longer has, and how they were taken out: "subtracted" or "replayed"."""

    experts: Sequence[Expert]
    how: str

    def described(self) -> dict[str, Any]:
        """As the manifest says it."""
        gone = [{"sha256": expert.sha256, "name": expert.name} for expert in self.experts]
        return {"experts": gone, "how": self.how}


@dataclass(frozen=True)
class IndexFile:
    """The index of shards, to be written: its name and its bytes."""

    name: str
    text: bytes


WeightsPlan = tuple[Sequence[WeightFile], IndexFile | None]
"""The weights files of a version, and their index where it has one."""


def names_below(folder: Path) -> list[str]:
    """Every file in a folder and in those below it, as manifests name them: "1_Pooling/config.json". Sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def plan_weights(
    specs: Iterable[TensorSpec],
    shard_bytes: int,
    names: WeightNames = WeightNames("model"),  # noqa: B008
) -> WeightsPlan:
    """How a version's weights are spread over files, of `shard_bytes` at the most, header and all; what is larger alone
    has a file of its own.
    """
    by_name = {spec.name: spec for spec in specs}
    opening = build_header((), METADATA)[1].size + ALIGNMENT
    plan = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda spec: room(spec, shard_bytes),
        filename_pattern=names.pattern,
        max_shard_size=shard_bytes - opening,
    )
    files = [
        WeightFile(name, [by_name[tensor] for tensor in tensors]) for name, tensors in plan.filename_to_tensors.items()
    ]
    return files, index_of(files, names.index) if plan.is_sharded else None


def index_of(files: Sequence[WeightFile], name: str) -> IndexFile:
    """The index of these shards."""
    total = sum(spec.nbytes for file in files for spec in file.specs)
    places = {spec.name: file.name for file in files for spec in file.specs}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return IndexFile(name, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")


def manifest(
    *,
    head: Head,
    number: int,
    base_sha256: str,
    parent: Version | None,
    experts: int,
    expert: NewExpert | None,
    figures: Mapping[str, float],
    dtype: str,
    created_at: datetime,
    files: Sequence[FileEntry],
    state: FileEntry | None,
    record: FileEntry | None = None,
    approximate: bool = False,
    withdrawal: Withdrawal | None = None,
    adapter: Mapping[str, Any] | None = None,
) -> bytes:
    """The bytes of a version's manifest.json: what it is, what it came from, and the sha256 of all it consists of.

    approximate: its method folded this expert with sums that the later ones still change.
    """
    content = {
        "format": 1,
        "head": head.name,
        "version": number,
        "method": head.method,
        "params": head.params,
        "base_sha256": base_sha256,
        "parent": {"version": parent.number, "manifest_sha256": parent.manifest_sha256} if parent else None,
        "experts": experts,
        "expert": _expert(expert) if expert else None,
        "withdrawn": withdrawal.described() if withdrawal else None,
        "approximate": approximate,
        "figures": figures,
        "dtype": dtype,
        "created_at": created_at.isoformat(),
        "software": {"mainstem": software_version(), "torch": torch.__version__},
        "files": [asdict(file) for file in files],
        "state": asdict(state) if state else None,
        "record": asdict(record) if record else None,
        "adapter": adapter,
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def _expert(expert: NewExpert) -> dict[str, Any]:
    task = expert.about.get("task") if expert.about else None
    return {"sha256": expert.sha256, "name": expert.name, "task": task, "weight": expert.weight}


def entry(path: Path, name: str | None = None, read: Callable[[int], object] = lambda _: None) -> FileEntry:
    """Hashes a file as it is on the disk. name: as the manifest has it, where that is not the file's own. `read` hears
    of the bytes as they are read, and may raise to end it.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
            read(len(chunk))
    return FileEntry(name or path.name, path.stat().st_size, digest.hexdigest())


def problems(
    home: Home,
    version: Version,
    *,
    hashes: bool,
    extras: bool = True,
    state: bool = True,
    read: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """What is wrong with a version's files, in words; nothing where they are as they were committed.

    Sizes are always compared; `hashes` reads every byte; `extras` also names files that do not belong; without `state`
    it may be gone. The manifest itself is held against the registry. `read` hears of the bytes that are hashed, and may
    raise to end it.
    """
    folder = home.version(version.head, version.number)
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        return [f"{_relative(home, path)}: {error.strerror}"]
    read(len(text))
    if hashlib.sha256(text).hexdigest() != version.manifest_sha256:
        return [f"{_relative(home, path)}: its sha256 is not the registry's"]
    content: dict[str, Any] = json.loads(text)
    expected = [(folder / file["name"], file) for file in content["files"]]
    if content["state"] and state:
        expected.append((home.head_state(version.head, version.number) / STATE_FILE, content["state"]))
    if content.get("record"):
        expected.append((home.view_record(version.head, version.number), content["record"]))
    found = [_problem(home, path, file, hashes, read) for path, file in expected]
    listed = {MANIFEST, *(file["name"] for file in content["files"])}
    extra = [f"{_relative(home, folder / name)}: not in the manifest" for name in _unlisted(folder, listed)]
    return [problem for problem in found if problem] + (extra if extras else [])


def _unlisted(folder: Path, listed: Collection[str]) -> list[str]:
    """What is in a folder, or in one below it, and neither listed nor a folder on the way to what is."""
    expected = {*listed, *(str(above) for name in listed for above in PurePosixPath(name).parents)}
    return sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*")} - expected)


def _problem(
    home: Home, path: Path, file: Mapping[str, Any], hashes: bool, read: Callable[[int], object]
) -> str | None:
    try:
        size = path.stat().st_size
        if size != file["size"]:
            return f"{_relative(home, path)}: {size} bytes, the manifest says {file['size']}"
        if hashes:
            found = entry(path, read=read)
            if found.sha256 != file["sha256"]:
                return f"{_relative(home, path)}: its sha256 is not the manifest's"
    except OSError as error:
        return f"{_relative(home, path)}: {error.strerror}"
    return None


def _relative(home: Home, path: Path) -> str:
    return str(path.relative_to(home.root))
