"""A registry of very many experts, and what its questions cost."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from types import TracebackType

from sqlalchemy import Engine, Pool, event

from tests.registry.samples import digest

WHEN = "2026-03-01 12:30:15.123456"
KEPT = 6  # versions of each head that are not collected


def fill(path: Path, merged: int) -> Path:
    """Gives a new registry so many merged experts, by SQL alone: ten times as fast as the store, which syncs each."""
    with closing(sqlite3.connect(path, isolation_level=None)) as raw:
        heads = [name for (name,) in raw.execute("SELECT name FROM heads")]
        raw.execute("BEGIN")
        raw.executemany(
            "INSERT INTO experts (id, name, kind, sha256, size_bytes, status, received_at, entry, norm, version,"
            " finished_at, place, about, trained_head, trained_version)"
            " VALUES (?, ?, 'file', ?, 1000, 'merged', ?, ?, ?, ?, ?, ?, ?, 'main', ?)",
            [_expert(n) for n in range(1, merged + 1)],
        )
        raw.executemany(
            "INSERT INTO versions (head, number, parent, manifest_sha256, size_bytes, totals, figures, expert_id,"
            " seconds, created_at, collected) VALUES (?, ?, ?, ?, 1000, ?, '{}', ?, 1.5, ?, ?)",
            (
                (head, n, n - 1, digest(-n), json.dumps({"experts": n}), n, WHEN, n <= merged - KEPT)
                for head in heads
                for n in range(1, merged + 1)
            ),
        )
        raw.executemany(
            "INSERT INTO evaluations (weights_sha256, command_sha256, scores, seconds, created_at)"
            " VALUES (?, ?, '{}', 1.5, ?)",
            [(digest(n), digest(0), WHEN) for n in range(1, merged + 1)],
        )
        raw.execute("UPDATE heads SET live = ?, newest = ?", (merged, merged))
        raw.execute("COMMIT")
    return path


def _expert(n: int) -> tuple[object, ...]:
    about = json.dumps({"name": f"task {n}"})
    name, place, entry = f"expert-{n}.safetensors", f"archive/{n:06d}", f"1:{n}:{n}"
    return n, name, digest(n), WHEN, entry, 1 + n / 1e6, n, WHEN, place, about, n - 1


class Steps:
    """Counts, as a context manager, what is done over every connection of every reader and store of this process:
    in `taken` the steps of SQLite's virtual machine, in `statements` the statements. What looks through a whole file
    on purpose (`registry.engine.check`) has a connection of its own and is not counted.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.statements = 0

    def __enter__(self) -> "Steps":
        event.listen(Pool, "checkout", self._watch)
        event.listen(Engine, "before_cursor_execute", self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        event.remove(Pool, "checkout", self._watch)
        event.remove(Engine, "before_cursor_execute", self._note)

    def _watch(self, raw: sqlite3.Connection, *_: object) -> None:
        raw.set_progress_handler(self._step, 1)

    def _step(self) -> int:
        self.taken += 1
        return 0

    def _note(self, *_: object) -> None:
        self.statements += 1
