"""Records for the registry's tests: two heads, and experts named after a number."""

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from registry.records import BaseModel, Head, NewExpert, NewVersion, Status
from registry.store import Store

WHEN = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
BASE = BaseModel("encoder", "ab" * 32, 22_713_216, 90_888_448, WHEN)
HEADS = [Head("main", "opcm", {"alpha": 0.5}, 0, 0), Head("init", "ema", {"beta": 0.1}, 0, 0)]


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


def expert(number: int, status: Status = Status.MERGED, **changes: object) -> NewExpert:
    values: dict[str, object] = {
        "name": f"expert-{number}.safetensors",
        "kind": "file",
        "sha256": digest(number),
        "size_bytes": 1000 + number,
        "status": status,
        "received_at": WHEN,
        "entry": f"2049:{number}",
        "norm": float(number),
    }
    return NewExpert(**(values | changes))


def versions(number: int, parent: int | None = None) -> list[NewVersion]:
    """Version `number` of both heads, after `parent` (the one before unless told otherwise)."""
    before = number - 1 if parent is None else parent
    return [
        NewVersion(
            head.name, number, before if number else None, digest(-number), 500, {"n": number}, {"lambda": 1.0}, 0.25
        )
        for head in HEADS
    ]


def make(path: Path, merged: int = 0) -> Path:
    """A closed registry at `path` with that many merged experts."""
    Store.create(path, BASE, HEADS, versions(0))
    with Store.open(path) as store:
        for number in range(1, merged + 1):
            store.commit(expert(number), versions(number))
    return path
