"""The registry as the daemon uses it, and the only place with transactions.

`Reader` answers questions, from any number of threads and processes. `Store` is the one writer; it answers the same
questions. Every method is one transaction: it sees one state of the database, and changes it wholly or not at all.
After `StorageFailed` a writer must be closed and not be asked again: only a new start tells what the disk holds.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, Select, column, func, insert, select, table, update

from registry import migrations
from registry.engine import APPLICATION_ID, REBUILD_HINT, check, connect, examine, reading, translated, writing
from registry.errors import AlreadyMerged, AlreadyThere, BadRecord, Busy, Damaged, WrongRevision
from registry.records import BaseModel, Expert, Head, NewExpert, NewVersion, Status, Version
from registry.statements import (
    PROGRAM_HINT,
    Record,
    advance,
    called,
    columns,
    fetch,
    insert_expert,
    insert_head,
    insert_versions,
    merged_as,
    merged_content,
    newest_experts,
    require_one_each,
    withdraw,
)
from registry.tables import ExpertRow, HeadRow, HomeRow, VersionRow


class Reader:
    """Questions to a registry, read-only and safe to share between threads. Close it, or use it in `with`."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens the registry at `path`. Raises RegistryError when it is missing, not ours, damaged or not migrated."""
        revision = examine(path)
        migrations.refuse_unknown(path, revision)
        if revision != migrations.newest():
            raise WrongRevision(
                f"{path}: its layout is {revision}, this mainstem reads {migrations.newest()}",
                "start `mainstem run` on this home once: it upgrades the registry",
            )
        return cls(path, reading(path))

    def close(self) -> None:
        """Closes every connection."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def base(self) -> BaseModel:
        """The base of this home."""
        found = self._one(BaseModel, select(HomeRow))
        if found is None:
            raise Damaged(f"{self.path}: it names no base", REBUILD_HINT)
        return found

    def heads(self) -> list[Head]:
        """All heads, in the order in which they were made."""
        return self._all(Head, select(HeadRow).order_by(HeadRow.position))

    def head(self, name: str) -> Head | None:
        """The head of that name."""
        return self._one(Head, select(HeadRow).where(HeadRow.name == name))

    def version(self, head: str, number: int) -> Version | None:
        """One version of one head; also one whose files were collected."""
        return self._one(Version, select(VersionRow).where(VersionRow.head == head, VersionRow.number == number))

    def versions(
        self, head: str, limit: int | None = None, newest_first: bool = True, include_collected: bool = True
    ) -> list[Version]:
        """The versions of one head, `limit` of them at the most."""
        query = select(VersionRow).where(VersionRow.head == head).limit(limit)
        if not include_collected:
            query = query.where(VersionRow.collected.is_(False))
        number = VersionRow.number
        return self._all(Version, query.order_by(number.desc() if newest_first else number))

    def expert(self, expert_id: int) -> Expert | None:
        """The expert with that arrival id."""
        return self._one(Expert, select(ExpertRow).where(ExpertRow.id == expert_id))

    def experts(
        self, status: Status | None = None, limit: int = 100, before: int | None = None, name: str | None = None
    ) -> list[Expert]:
        """The newest experts first. The next page is what lies `before` the last id of this one.

        name: a glob (*, ?, [...]) that the name it was dropped by, or the one in its expert.json, must match.
        """
        return self._all(Expert, newest_experts(status, limit, before, name))

    def find_experts(self, text: str) -> list[Expert]:
        """The expert with that id; if there is none, all with that sha256 prefix or exactly that name, newest first.

        Its name is the one it was dropped by, or the one in its expert.json.
        """
        # SQLite's integers end at 19 digits.
        if text.isascii() and text.isdigit() and len(text) < 19 and (expert := self.expert(int(text))):
            return [expert]
        return self._all(Expert, select(ExpertRow).where(called(text)).order_by(ExpertRow.id.desc()))

    def last_expert_id(self) -> int:
        """The highest id that an expert was ever given; 0 where none came yet."""
        given: Select[Any] = (
            select(column("seq")).select_from(table("sqlite_sequence")).where(column("name") == "experts")
        )
        with self._read() as connection:
            return connection.execute(given).scalar() or 0

    def merged(self, sha256: str) -> Expert | None:
        """The merged expert with those bytes."""
        return self._one(Expert, merged_as(sha256))

    def merged_content(self, content_sha256: str) -> Expert | None:
        """The merged expert that does the same to the base, in whatever files."""
        return self._one(Expert, merged_content(content_sha256))

    def without_content(self, least: float, most: float) -> list[Expert]:
        """The merged experts of which nobody noted what they do to the base, with a norm in that range."""
        unknown = ExpertRow.status == Status.MERGED, ExpertRow.content_sha256.is_(None)
        return self._all(Expert, select(ExpertRow).where(*unknown, ExpertRow.norm.between(least, most)))

    def lineage(self) -> list[Expert]:
        """Every expert that is in the merged models, in the order of merging."""
        query = select(ExpertRow).where(ExpertRow.status == Status.MERGED)
        return self._all(Expert, query.order_by(ExpertRow.version))

    def unplaced(self) -> list[Expert]:
        """The experts whose file has not been moved out of the inbox for certain, oldest first."""
        return self._all(Expert, select(ExpertRow).where(ExpertRow.place.is_(None)).order_by(ExpertRow.id))

    def counts(self) -> dict[Status, int]:
        """How many experts have each status; every status is there."""
        query = select(ExpertRow.status, func.count()).group_by(ExpertRow.status)
        with self._read() as connection:
            found = {row[0]: row[1] for row in connection.execute(query)}
        return {status: found.get(status, 0) for status in Status}

    def merged_norms(self) -> list[float]:
        """The norms of all merged experts that have one."""
        norms = select(ExpertRow.norm).where(ExpertRow.status == Status.MERGED, ExpertRow.norm.is_not(None))
        with self._read() as connection:
            return list(connection.scalars(norms))

    def check(self) -> None:
        """Raises Damaged, and says why, when the file, a reference or a head's live version is not sound."""
        with translated(self.path), closing(connect(self.path, "ro")) as raw:
            check(raw, self.path)
        there = VersionRow.head == HeadRow.name, VersionRow.number == HeadRow.live, VersionRow.collected.is_(False)
        for head in self._all(Head, select(HeadRow).where(~select(VersionRow.head).where(*there).exists())):
            raise Damaged(f"{self.path}: head {head.name} has lost its live version {head.live}", REBUILD_HINT)

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with translated(self.path), self._engine.begin() as connection:
            yield connection

    def _all(self, kind: type[Record], query: Select[Any]) -> list[Record]:
        with self._read() as connection:
            return fetch(connection, kind, query)

    def _one(self, kind: type[Record], query: Select[Any]) -> Record | None:
        return next(iter(self._all(kind, query)), None)


class Store(Reader):
    """The single writer. Opening it upgrades an older layout, after a backup beside it."""

    @classmethod
    def create(cls, path: Path, base: BaseModel, heads: Sequence[Head], versions: Sequence[NewVersion]) -> None:
        """Makes a new registry at `path`: one file, complete and synced, with version 0 of every head.

        After an error an unfinished file may be left, which nothing accepts as a registry. Raises RegistryError.
        """
        if path.exists() or path.is_symlink():
            raise AlreadyThere(f"{path}: something is there already", "remove it, or choose another home")
        require_one_each(heads, versions)
        if any((head.live, head.newest) != (0, 0) for head in heads) or any(version.number for version in versions):
            raise BadRecord("a new registry must begin with version 0 of every head", PROGRAM_HINT)
        store = cls(path, writing(path, create=True))
        with store, translated(path):
            migrations.upgrade(store._engine)
            with store._write() as connection:
                connection.exec_driver_sql(f"PRAGMA application_id = {APPLICATION_ID}")  # last: now it is a registry
                connection.execute(insert(HomeRow).values(id=1, **columns(BaseModel, base)))
                for head in heads:
                    insert_head(connection, head)
                insert_versions(connection, versions, expert_id=None, now=datetime.now(UTC))
            with closing(store._engine.raw_connection()) as raw:
                raw.cursor().execute("VACUUM")  # the migrations' free pages, which no check looks at
            store.checkpoint()

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens the registry at `path` to write. RegistryError when it is missing, not ours, damaged or newer."""
        revision = examine(path)
        migrations.refuse_unknown(path, revision)
        store = cls(path, writing(path))
        try:
            with translated(path):
                if revision != migrations.newest():
                    migrations.back_up(path, migrations.newest())
                    migrations.upgrade(store._engine)
                with store._write():
                    pass  # shows here, and not at the first commit, that nobody else is writing
        except BaseException:
            store.close()
            raise
        return store

    def commit(self, expert: NewExpert, versions: Sequence[NewVersion]) -> Expert:
        """THE COMMIT POINT: the expert is merged, and every head is at its new version, when this returns.

        `versions` holds one version for each head, all with the same number. Raises StaleHead unless every head's
        live version is the new one's parent and its newest is one below; AlreadyMerged when these bytes or tensors are
        in the lineage; BadRecord; or an error of the disk.
        """
        if expert.status is not Status.MERGED or expert.sha256 is None:
            raise BadRecord(f"{expert.name}: only a merged expert with its sha256 can be committed", PROGRAM_HINT)
        now = datetime.now(UTC)
        with self._write() as connection:
            heads = fetch(connection, Head, select(HeadRow))
            require_one_each(heads, versions)
            for earlier in fetch(connection, Expert, merged_as(expert.sha256)):
                raise AlreadyMerged(
                    f"{expert.name}: the same bytes were merged as expert {earlier.id} ({earlier.name})",
                    "nothing needs to be done: an expert counts once",
                )
            for earlier in fetch(connection, Expert, merged_content(expert.content_sha256 or "")):
                raise AlreadyMerged(
                    f"{expert.name}: the same tensors were merged as expert {earlier.id} ({earlier.name})",
                    "nothing needs to be done: an expert counts once",
                )
            for version in versions:
                advance(connection, version)
            merged = insert_expert(connection, expert, versions[0].number, now)
            insert_versions(connection, versions, merged.id, now)
        return merged

    def restate(self, versions: Sequence[NewVersion], withdrawn: Sequence[int] = ()) -> None:
        """Every head is at a new version that folds no new expert, and those withdrawn are in none of them any more.

        THE COMMIT POINT of such a version. Raises as `commit` does, and BadRecord where an expert is not merged.
        """
        with self._write() as connection:
            require_one_each(fetch(connection, Head, select(HeadRow)), versions)
            for version in versions:
                advance(connection, version)
            insert_versions(connection, versions, None, datetime.now(UTC))
            withdraw(connection, withdrawn, versions[0].number)

    def adopt(self, head: Head, versions: Sequence[NewVersion]) -> None:
        """A further head, with version 0 and the one it stands at. Raises BadRecord unless that is the others' newest.

        THE COMMIT POINT of a head that is added to a home.
        """
        with self._write() as connection:
            newest = {one.newest for one in fetch(connection, Head, select(HeadRow))}
            if newest != {head.newest} or {version.number for version in versions} != {0, head.live, head.newest}:
                raise BadRecord(f"head {head.name} stands at {head.newest}, the others at {newest}", PROGRAM_HINT)
            insert_head(connection, head)
            insert_versions(connection, versions, None, datetime.now(UTC))

    def record(self, expert: NewExpert) -> Expert:
        """Keeps an expert that was refused or is a duplicate. Raises RegistryError."""
        if expert.status is Status.MERGED:
            raise BadRecord(f"{expert.name}: a merged expert must be committed with its versions", PROGRAM_HINT)
        with self._write() as connection:
            return insert_expert(connection, expert, None, datetime.now(UTC))

    def note_content(self, expert_id: int, content_sha256: str) -> None:
        """Notes what a merged expert does to the base; nothing where another merged one is noted with it."""
        row = update(ExpertRow).where(ExpertRow.id == expert_id)
        with self._write() as connection:
            if not fetch(connection, Expert, merged_content(content_sha256)):
                connection.execute(row.values(content_sha256=content_sha256))

    def placed(self, expert_id: int, place: str) -> None:
        """Notes that the expert's file has left the inbox for `place`, relative to HOME."""
        with self._write() as connection:
            done = connection.execute(update(ExpertRow).where(ExpertRow.id == expert_id).values(place=place))
            if done.rowcount != 1:
                raise BadRecord(f"there is no expert {expert_id}", PROGRAM_HINT)

    def collected(self, head: str, number: int) -> None:
        """Notes that the version's files were removed. Raises BadRecord for an unknown version or a live one."""
        live = select(HeadRow.live).where(HeadRow.name == head).scalar_subquery()
        row = update(VersionRow).where(VersionRow.head == head, VersionRow.number == number, VersionRow.number != live)
        with self._write() as connection:
            if connection.execute(row.values(collected=True)).rowcount != 1:
                raise BadRecord(f"head {head} has no version {number}, or it is the live one", PROGRAM_HINT)

    def checkpoint(self) -> None:
        """Moves the whole write-ahead log into the database file, synced. Raises Busy when a reader is in the way."""
        with translated(self.path), closing(self._engine.raw_connection()) as raw:
            busy, _, _ = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise Busy(f"{self.path}: the write-ahead log is in use", "close what reads the registry, then try again")

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with translated(self.path), self._engine.execution_options(write=True).begin() as connection:
            yield connection
