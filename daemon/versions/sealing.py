"""From a version that is written to one that only waits for its row: companions, card and manifest go beside its
weights, all durable, and then everything is renamed into its place.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.layout import CARD, MANIFEST, Home
from daemon.manifest import FileEntry, manifest
from daemon.versions.adapter import Adapter
from daemon.versions.card import FRONT_MATTER_BYTES, MOST_EXPERTS, AboutBase, Card, about_base, render
from daemon.versions.checking import entry, names_below
from daemon.versions.heads import HeadTip
from daemon.versions.writing import Written
from registry.reader import Reader
from registry.records import BaseModel, Expert, NewExpert, NewVersion, RelativeTo, Scores, Status

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


def stage(home: Home, written: Written, beside: Sequence[str]) -> None:
    """Puts the files of the base that go with the weights beside them: from here on the folder can be loaded."""
    published = written.published
    there = {file.name for file in written.weights}
    config = home.base / CONFIG
    if written.dtype != "base" and CONFIG not in there and config.is_file():
        durable.write_file(published / CONFIG, config_in(config.read_bytes(), written.dtype))
        there.add(CONFIG)
    copy_files(home.base, published, [name for name in beside if name not in there])


def seal(
    home: Home,
    tip: HeadTip,
    number: int,
    written: Written,
    *,
    origin: Origin,
    adapter: Adapter | None = None,
    scores: Scores | None = None,
    verdict: Mapping[str, Any] | None = None,
) -> NewVersion:
    """Completes what is staged, makes all of the version durable, and returns what to commit of it.

    tip: the head as it stands. Whatever lies in the folder, or in one below it, is hashed and listed. scores, verdict:
    the gate's.
    """
    published, totals, dtype = written.published, written.totals, written.dtype
    weights = {file.name for file in written.weights}
    figures = dict(tip.method.figures(totals))
    card = Card(
        head=tip.head.name,
        number=number,
        method=tip.method,
        base=origin.base,
        about=read_about_base(home.base),
        experts=totals.experts,
        newest=origin.newest,
        figures=figures,
        dtype=dtype,
        approximate=written.approximate,
        relative=tip.head.relative_to is RelativeTo.TRAINED_FROM,
        withdrawal=written.withdrawal,
        files=[file.name for file in written.weights],
        adapter=(adapter.rank, adapter.kept) if adapter else None,
        adamerging=written.adamerging,
        scores=scores or {},
    )
    durable.write_file(published / CARD, render(card))
    others = [entry(published / name, name) for name in names_below(published) if name not in weights]
    files = sorted([*written.weights, *others], key=lambda file: file.name)
    text = manifest(
        head=tip.head,
        number=number,
        base_sha256=origin.base.sha256,
        parent=tip.version,
        experts=totals.experts,
        expert=origin.expert,
        figures=figures,
        dtype=dtype,
        created_at=datetime.now(UTC),
        files=files,
        state=written.state,
        record=written.record,
        approximate=written.approximate,
        withdrawal=written.withdrawal,
        adapter=adapter.described() if adapter else None,
        adamerging=written.adamerging,
        scores=scores,
        verdict=verdict,
    )
    durable.write_file(published / MANIFEST, text)
    hit("manifest.written")
    sync_folders(published, files)
    if written.state:
        durable.sync_folder(written.state_folder)
    return NewVersion(
        head=tip.head.name,
        number=number,
        parent=tip.version.number,
        manifest_sha256=hashlib.sha256(text).hexdigest(),
        size_bytes=sum(file.size for file in files),
        totals={"experts": float(totals.experts), **totals.scalars},
        figures=figures,
        verdict=verdict,
    )


def publish(home: Home, head: str, number: int, written: Written) -> None:
    """Renames a sealed version into its place; it counts once its row is committed."""
    if written.record_file:
        durable.make_folder(home.views(head))  # its name is durable with the state's
        durable.rename(written.record_file, home.view_record(head, number))
    if written.state:
        durable.rename(written.state_folder, home.head_state(head, number))
    durable.rename(written.published, home.version(head, number))


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


def config_in(text: bytes, dtype: str) -> bytes:
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
