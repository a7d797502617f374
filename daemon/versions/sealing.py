"""The last step before a version is published: companions, card and manifest go beside its weights, all durable."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.layout import CARD, MANIFEST, Home
from daemon.versions.adapter import Adapter
from daemon.versions.card import FRONT_MATTER_BYTES, MOST_EXPERTS, AboutBase, Card, about_base, render
from daemon.versions.heads import LiveHead
from daemon.versions.manifest import FileEntry, Withdrawal, entry, manifest, names_below
from projector.method import Totals
from registry.records import BaseModel, Expert, NewExpert, NewVersion, Status
from registry.store import Reader

CONFIG = "config.json"
MAX_CONFIG_BYTES = 1 << 20
DTYPE_KEYS = ("dtype", "torch_dtype")  # as transformers has it from version 5 on, and before


@dataclass(frozen=True)
class Origin:
    """What a version consists of, for its card and its manifest.

    expert: the one that it folds, if any. newest: its experts, newest first, as many as the card lists.
    """

    base: BaseModel
    expert: NewExpert | None
    newest: Sequence[NewExpert]


def origin(reader: Reader, expert: NewExpert | None = None, gone: Sequence[Expert] = ()) -> Origin:
    """Every merged expert of the registry, less those that are gone, and the one that is about to be committed."""
    out = {one.id for one in gone}
    merged = [one for one in reader.experts(Status.MERGED, limit=MOST_EXPERTS + len(out)) if one.id not in out]
    newest: Sequence[NewExpert] = [expert, *merged] if expert else merged
    return Origin(reader.base(), expert, newest[:MOST_EXPERTS])


def seal(
    home: Home,
    live: LiveHead,
    number: int,
    published: Path,
    weights: Sequence[FileEntry],
    state: FileEntry | None,
    totals: Totals,
    *,
    origin: Origin,
    beside: Sequence[str],
    dtype: str,
    record: FileEntry | None = None,
    approximate: bool = False,
    withdrawal: Withdrawal | None = None,
    adapter: Adapter | None = None,
) -> NewVersion:
    """Completes the folder `published`, which holds the files of `weights`, and returns what to commit of it.

    beside: the files of the base that go with the weights. Whatever else lies in the folder, or in one below it, is
    hashed and listed too. live: the head as it stands. totals:
    after this version. The folder of the state is the caller's to sync.
    """
    written = {file.name for file in weights}
    config, there = home.base / CONFIG, set(written)
    if dtype != "base" and CONFIG not in written and config.is_file():
        durable.write_file(published / CONFIG, _config_in(config.read_bytes(), dtype))
        there.add(CONFIG)
    copy_files(home.base, published, [name for name in beside if name not in there])
    figures = dict(live.method.figures(totals))
    card = Card(
        head=live.head.name,
        number=number,
        method=live.method,
        base=origin.base,
        about=read_about_base(home.base),
        experts=totals.experts,
        newest=origin.newest,
        figures=figures,
        dtype=dtype,
        approximate=approximate,
        withdrawal=withdrawal,
        files=[file.name for file in weights],
        adapter=(adapter.rank, adapter.kept) if adapter else None,
    )
    durable.write_file(published / CARD, render(card))
    others = [entry(published / name, name) for name in names_below(published) if name not in written]
    files = sorted([*weights, *others], key=lambda file: file.name)
    text = manifest(
        head=live.head,
        number=number,
        base_sha256=origin.base.sha256,
        parent=live.version,
        experts=totals.experts,
        expert=origin.expert,
        figures=figures,
        dtype=dtype,
        created_at=datetime.now(UTC),
        files=files,
        state=state,
        record=record,
        approximate=approximate,
        withdrawal=withdrawal,
        adapter=adapter.described() if adapter else None,
    )
    durable.write_file(published / MANIFEST, text)
    hit("manifest.written")
    sync_folders(published, files)
    return NewVersion(
        head=live.head.name,
        number=number,
        parent=live.version.number,
        manifest_sha256=hashlib.sha256(text).hexdigest(),
        size_bytes=sum(file.size for file in files),
        totals={"experts": float(totals.experts), **totals.scalars},
        figures=figures,
    )


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copies the files of these names, which may lie in folders below; the folders are the caller's to sync."""
    for name in names:
        durable.make_folder((target / name).parent, public=True)
        durable.copy_file(source / name, target / name)


def sync_folders(folder: Path, files: Sequence[FileEntry]) -> None:
    """Makes the names of these files durable, in the folders below first."""
    below = {folder / above for file in files for above in Path(file.name).parents}
    for path in sorted(below | {folder}, reverse=True):
        durable.sync_folder(path)


def read_about_base(folder: Path) -> AboutBase:
    """What the files of the base in this folder say of it."""
    readme, config = _opening(folder / CARD, FRONT_MATTER_BYTES), _opening(folder / CONFIG, MAX_CONFIG_BYTES)
    return about_base(readme, config, [path.name for path in folder.iterdir()])


def _opening(path: Path, most: int) -> bytes:
    """The first bytes of a file; nothing where there is none."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(most)


def _config_in(text: bytes, dtype: str) -> bytes:
    """The config.json with `dtype` ("float32") wherever it names one, also for a part of the model: loaders convert to
    it whatever the weights are in.

    One that is no JSON object, or names none, comes back as it is.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return text
    stated = _stated(config, dtype)
    return text if stated == config else json.dumps(stated, indent=2).encode() + b"\n"


def _stated(config: Any, dtype: str) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in DTYPE_KEYS and isinstance(value, str) else _stated(value, dtype)
        for key, value in config.items()
    }
