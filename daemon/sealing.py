"""The last step before a version is published: companions and the manifest go beside its weights, all durable."""

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from daemon import durable
from daemon.failpoints import hit
from daemon.generations import FileEntry, Withdrawal, companions, entry, manifest
from daemon.home import MANIFEST, Home
from daemon.lines import Line
from projector.method import Totals
from registry.records import NewExpert, NewVersion


def seal(
    home: Home,
    line: Line,
    number: int,
    published: Path,
    weights: Sequence[FileEntry],
    state: FileEntry | None,
    totals: Totals,
    *,
    base_sha256: str,
    dtype: str,
    expert: NewExpert | None = None,
    record: FileEntry | None = None,
    approximate: bool = False,
    withdrawal: Withdrawal | None = None,
) -> NewVersion:
    """Completes the folder `published`, which holds the files of `weights`, and returns what to commit of it.

    line: the head as it stands. totals: after this version. The folder of the state is the caller's to sync.
    """
    written = {file.name for file in weights}
    for path in companions(home.base):
        if path.name not in written:
            durable.copy_file(path, published / path.name)
    beside = [entry(path) for path in sorted(published.iterdir()) if path.name not in written]
    files = sorted([*weights, *beside], key=lambda file: file.name)
    figures = dict(line.method.figures(totals))
    text = manifest(
        head=line.head,
        number=number,
        base_sha256=base_sha256,
        parent=line.version,
        experts=totals.experts,
        expert=expert,
        figures=figures,
        dtype=dtype,
        created_at=datetime.now(UTC),
        files=files,
        state=state,
        record=record,
        approximate=approximate,
        withdrawal=withdrawal,
    )
    durable.write_file(published / MANIFEST, text)
    hit("manifest.written")
    durable.sync_folder(published)
    return NewVersion(
        head=line.head.name,
        number=number,
        parent=line.version.number,
        manifest_sha256=hashlib.sha256(text).hexdigest(),
        size_bytes=sum(file.size for file in files),
        totals={"experts": float(totals.experts), **totals.scalars},
        figures=figures,
    )
