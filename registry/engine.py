"""How the database file is opened, and what SQLite's complaints mean.

One process writes: what merges through one connection, `writing`, and what tells others (the outbox) through one of its
own, a few rows at a time. Everybody else opens the file read-only: `reading`. The journal is a WAL, so readers never
wait for the writer and see the state as of their own first read. A reader still needs to write to the `-shm` file
beside the database, unless a writer that is running keeps it there; and one that closes after the writer leaves that
file and an empty log behind, which is harmless. Where it cannot write (a read-only disk, another user's folder) and
there is no log, nobody has the database open: it is read as a file that does not change, as long as it does not.

Nothing may open the database file by any other way than SQLite while it is in use: closing such a descriptor drops
the locks that SQLite holds on the file for the whole process.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError, DisconnectionError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from registry.errors import (
    BadRecord,
    Busy,
    Damaged,
    DiskFull,
    Missing,
    NoAccess,
    NotOurs,
    RegistryError,
    StorageFailed,
)

APPLICATION_ID = 0x6D61696E  # "main": written into the file's header, tells our databases from all others
BUSY_TIMEOUT_S = 5.0
Stamp = tuple[int, int, int]
REBUILD_HINT = "restore the registry from a backup, or make a new home and merge the archive into it again"


class Raw(sqlite3.Connection):
    """A connection to SQLite. `unchanged`: of a file that is taken not to change, what it is as long as it does not."""

    unchanged: Stamp | None = None


def connect(path: Path, mode: str) -> Raw:
    """A raw connection: mode "ro", "rw" (the file must exist) or "rwc". Transactions are the caller's to begin."""
    connection = _connect(path, mode)
    try:
        if mode == "ro" and (unchanged := _out_of_reach(connection, path)):
            connection.close()
            connection = _connect(path, "ro&immutable=1")
            connection.unchanged = unchanged
        connection.execute("PRAGMA foreign_keys = ON")
        if mode != "ro":
            (journal,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            connection.execute("PRAGMA synchronous = FULL")
            if journal != "wal":
                raise NoAccess(
                    f"{path}: SQLite cannot keep a write-ahead log here (journal mode {journal})",
                    "put the home on a local disk: network file systems lack the shared memory this needs",
                )
    except BaseException:
        connection.close()
        raise
    return connection


def _connect(path: Path, mode: str) -> Raw:
    uri = f"file://{quote(os.fsencode(path.absolute()))}?mode={mode}"
    return sqlite3.connect(
        uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, factory=Raw
    )  # the pools hand a connection from thread to thread, never to two at once


def _out_of_reach(connection: Raw, path: Path) -> Stamp | None:
    """What the database file is, where it can only be read as it lies there: SQLite may make no file beside it, and no
    log is there, so that all is in it and nobody writes it. None where it can be read as ever.
    """
    try:
        connection.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchall()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
            raise
        if (stamp := _stamp(path)) is None:
            raise
        return stamp
    return None


def _stamp(path: Path) -> Stamp | None:
    """Inode, size in bytes and time of the last change (ns) of a database; None where a log has more of it."""
    with suppress(FileNotFoundError):
        if path.with_name(f"{path.name}-wal").stat().st_size:
            return None
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def reading(path: Path) -> Engine:
    """A read-only engine, safe to share between threads."""
    return _engine(path, "ro", connections=8)


def writing(path: Path, *, create: bool = False) -> Engine:
    """The writer's engine: one connection, for which threads wait in turn."""
    return _engine(path, "rwc" if create else "rw", connections=1)


def _engine(path: Path, mode: str, connections: int) -> Engine:
    engine = create_engine(
        "sqlite://",
        creator=lambda: connect(path, mode),
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
    )

    @event.listens_for(engine, "checkout")
    def checkout(raw: Raw, *_: object) -> None:
        if raw.unchanged and raw.unchanged != _stamp(path):
            raise DisconnectionError("it has changed: the pool is to open it anew")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # Python's sqlite3 would begin only before the first INSERT, and deferred: two reads would see two states, and
        # a transaction that reads first could fail when it comes to write.
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def examine(path: Path) -> str:
    """The migration revision of the registry at `path`, after a check that it is one. Changes nothing.

    Whether it is sound all through takes as long as it is large: `check` is for the daemon's start and `verify`. Raises
    Missing, NotOurs, NoAccess or Damaged.
    """
    with translated(path):
        if not path.exists():
            raise Missing(f"{path}: there is no registry", "make a home with `mainstem init`, or point --home at one")
        if not path.is_file():
            raise NotOurs(f"{path}: not a file", "point --home at a home made by `mainstem init`")
        with closing(connect(path, "ro")) as connection:
            if connection.execute("PRAGMA application_id").fetchone() != (APPLICATION_ID,):
                raise NotOurs(
                    f"{path}: an SQLite file, but not a registry of mainstem",
                    "point --home at a home made by `mainstem init`",
                )
            rows = connection.execute("SELECT version_num FROM alembic_version").fetchall()
    revisions = [row[0] for row in rows]
    if len(revisions) != 1 or not isinstance(revisions[0], str):
        raise Damaged(f"{path}: it has the migration revisions {revisions} instead of one", REBUILD_HINT)
    return revisions[0]


def check(connection: sqlite3.Connection, path: Path) -> None:
    """Raises Damaged when SQLite finds a fault in the file's structure, a constraint or a reference."""
    faults = [str(row[0]) for row in connection.execute("PRAGMA quick_check") if row[0] != "ok"]
    for table, row, target, _ in connection.execute("PRAGMA foreign_key_check"):
        faults.append(f"row {row} of {table} points to nothing in {target}")
    if faults:
        raise Damaged(f"{path}: {'; '.join(faults[:5])}", REBUILD_HINT)


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turns what sqlite3, SQLAlchemy and the operating system raise into a RegistryError about `path`."""
    try:
        yield
    except sqlite3.Error as error:
        raise _meaning(path, error) from error
    except DBAPIError as error:
        raise _meaning(path, error.orig) from error
    except StatementError as error:  # a value that a column type refused
        raise BadRecord(f"{path}: {error.orig}", "this is a fault in the program: please report it") from error
    except PoolTimeout as error:
        raise Busy(f"{path}: all connections are taken", "ask again when fewer requests are running") from error
    except OSError as error:
        raise NoAccess(f"{path}: {error.strerror}", "check the owner and the permissions of the home") from error


def _meaning(path: Path, error: BaseException | None) -> RegistryError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the upper bits only refine it
    if str(error).startswith("Could not decode to UTF-8"):  # Python's own complaint: we only write UTF-8
        code = sqlite3.SQLITE_CORRUPT
    detail = f"{path}: {error}"
    match code:
        case sqlite3.SQLITE_NOTADB:
            return NotOurs(detail, "point --home at a home made by `mainstem init`; if it was one, " + REBUILD_HINT)
        case sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM | sqlite3.SQLITE_AUTH:
            return NoAccess(
                detail,
                "the registry's folder must be writable, but to read it after a clean stop or beside a daemon: check "
                "its owner and permissions, or start and stop `mainstem run` once where it can be written",
            )
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Busy(detail, "another program has the registry open: close it (only one may write), then try again")
        case sqlite3.SQLITE_FULL:
            return DiskFull(detail, "make room on the disk of the home")
        case sqlite3.SQLITE_CORRUPT:
            return Damaged(detail, REBUILD_HINT)
        case sqlite3.SQLITE_CONSTRAINT | sqlite3.SQLITE_MISMATCH | sqlite3.SQLITE_TOOBIG:
            return BadRecord(detail, "this is a fault in the program: please report it")
        case _:
            return StorageFailed(detail, "look for disk errors in the system's log, then start the daemon again")
