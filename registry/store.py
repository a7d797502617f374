"""The registry as the daemon uses it, and the only place with transactions.

`Reader` answers questions, from any number of threads and processes. `Store` is the one writer; it answers the same
questions. Every method is one transaction: it sees one state of the database, and changes it wholly or not at all.
After `StorageFailed` a writer must be closed and not be asked again: only a new start tells what the disk holds.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, Select, column, insert, select, table, update

from registry import migrations
from registry.engine import APPLICATION_ID, REBUILD_HINT, check, connect, examine, reading, translated, writing
from registry.errors import AlreadyMerged, AlreadyThere, BadRecord, Busy, Damaged, WrongRevision
from registry.records import BaseModel, Expert, Flag, Head, NewExpert, NewVersion, Status, Version
from registry.statements import (
    PROGRAM_HINT,
    Record,
    advance,
    called,
    columns,
    comes_from,
    experts_in,
    fetch,
    insert_expert,
    insert_head,
    insert_versions,
    is_kept,
    is_merged,
    lineage_after,
    merged_as,
    merged_content,
    newest_experts,
    require_one_each,
    withdraw,
)
from registry.tables import ExpertRow, HeadRow, HomeRow, TallyRow, VersionRow


class Reader:
    """Questions to a registry, read-only and safe to share between threads. Close it, or use it in `with`."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens the registry at `path`. Raises RegistryError when it is missing, not ours or not migrated.

        A damaged page is met, as Damaged, by the question that needs it; `check` looks for all of them.
        """
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
        self,
        head: str,
        limit: int | None = None,
        newest_first: bool = True,
        include_collected: bool = True,
        before: int | None = None,
    ) -> list[Version]:
        """The versions of one head, `limit` of them at the most; only those with a number below `before`."""
        query = select(VersionRow).where(VersionRow.head == head).limit(limit)
        if not include_collected:
            query = query.where(is_kept)
        if before is not None:
            query = query.where(VersionRow.number < before)
        number = VersionRow.number
        return self._all(Version, query.order_by(number.desc() if newest_first else number))

    def expert(self, expert_id: int) -> Expert | None:
        """The expert with that arrival id."""
        return self._one(Expert, select(ExpertRow).where(ExpertRow.id == expert_id))

    def experts(
        self,
        status: Status | None = None,
        limit: int = 100,
        before: int | None = None,
        name: str | None = None,
        flags: Collection[Flag] = (),
    ) -> list[Expert]:
        """The newest experts first. The next page is what lies `before` the last id of this one.

        name: a glob (*, ?, [...]) that the name it was dropped by, or the one in its expert.json, must match.
        flags: only those that have one of these, where any are given.
        """
        return self._all(Expert, newest_experts(status, limit, before, name, flags))

    def find_experts(self, text: str, limit: int | None = None) -> list[Expert]:
        """The expert with that id; if there is none, all with that sha256 prefix or exactly that name, newest first.

        Its name is the one it was dropped by, or the one in its expert.json. limit: of more than so many come those
        that were ever merged first.
        """
        # SQLite's integers end at 19 digits.
        if text.isascii() and text.isdigit() and len(text) < 19 and (expert := self.expert(int(text))):
            return [expert]
        newest_first = ExpertRow.id.desc()
        query = select(ExpertRow).where(called(text))
        if limit is None:
            return self._all(Expert, query.order_by(newest_first))
        found = self._all(Expert, query.order_by(ExpertRow.version.is_(None), newest_first).limit(limit))
        return sorted(found, key=lambda expert: -expert.id)

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
        unknown = is_merged, ExpertRow.content_sha256.is_(None)
        query = select(ExpertRow).where(*unknown, ExpertRow.norm.between(least, most))
        return self._all(Expert, query)

    def lineage(self, after: int = 0, limit: int | None = None) -> list[Expert]:
        """The experts that are in the merged models, in the order of merging.

        The next page is what came `after` the version of the last expert of this one.
        """
        return self._all(Expert, lineage_after(after, limit))

    def experts_in(self, number: int, after: int = 0, limit: int | None = None) -> list[Expert]:
        """The experts that version `number` of every head has, in the order of merging; pages as `lineage` has them."""
        return self._all(Expert, experts_in(number, after, limit))

    def comes_from(self, head: str, number: int, ancestor: int) -> bool:
        """Whether a version of that head has what `ancestor` has: it is that one, or was made from it."""
        with self._read() as connection:
            return comes_from(connection, head, number, ancestor)

    def unplaced(self) -> list[Expert]:
        """The experts whose file has not been moved out of the inbox for certain, oldest first."""
        return self._all(Expert, select(ExpertRow).where(ExpertRow.place.is_(None)).order_by(ExpertRow.id))

    def counts(self) -> dict[Status, int]:
        """How many experts have each status; every status is there."""
        with self._read() as connection:
            found = {row.status: row.experts for row in connection.execute(select(TallyRow.status, TallyRow.experts))}
        return {status: found.get(status, 0) for status in Status}

    def merged_norms(self, limit: int | None = 1000) -> list[float]:
        """The norms of the newest `limit` merged experts that have one, newest first; None takes all."""
        norms = select(ExpertRow.norm).where(is_merged, ExpertRow.norm.is_not(None))
        with self._read() as connection:
            return list(connection.scalars(norms.order_by(ExpertRow.version.desc()).limit(limit)))

    def check(self) -> None:
        """Raises Damaged, and says why, when the file, a reference or a head's live version is not sound."""
        with translated(self.path), closing(connect(self.path, "ro")) as raw:
            check(raw, self.path)
            raw.execute("BEGIN")  # somebody may be writing
            told = dict(raw.execute("SELECT status, experts FROM tallies WHERE experts != 0"))
            found = dict(raw.execute("SELECT status, count(*) FROM experts GROUP BY status"))
        if told != found:
            raise Damaged(f"{self.path}: it counts the experts as {told}, there are {found}", REBUILD_HINT)
        there = VersionRow.head == HeadRow.name, VersionRow.number == HeadRow.live, VersionRow.collected.is_(False)
        for head in self._all(Head, select(HeadRow).where(~select(VersionRow.head).where(*there).exists())):
            raise Damaged(f"{self.path}: head {head.name} has lost its live version {head.live}", REBUILD_HINT)

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with translated(self.path), self._engine.begin() as connection:
            yield connection

    def _all(self, kind: type[Record], query: Select[Any]) -> list[Record]:
        with self._read() as connection:
            try:
                return fetch(connection, kind, query)
            except (ValueError, TypeError, OverflowError) as error:  # a value that none of ours can be
                raise Damaged(f"{self.path}: {error}", REBUILD_HINT) from error

    def _one(self, kind: type[Record], query: Select[Any]) -> Record | None:
        return next(iter(self._all(kind, query)), None)


Patience = Callable[[Busy | None], None]
"""Hears that another program holds the registry, as long as it does, and may raise to give up; None once it is over."""


class Store(Reader):
    """The single writer. Opening it upgrades an older layout, after a backup beside it."""

    _patience: Patience | None = None

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
    def open(cls, path: Path, patience: Patience | None = None) -> Self:
        """Opens the registry at `path` to write. RegistryError when it is missing, not ours or newer, or where an older
        one that is to be upgraded is damaged.

        patience: with it no change raises Busy where another program holds the write lock: it waits.
        """
        revision = examine(path)
        migrations.refuse_unknown(path, revision)
        store = cls(path, writing(path))
        store._patience = patience
        try:
            with translated(path):
                if revision != migrations.newest():
                    with closing(connect(path, "ro")) as raw:
                        check(raw, path)
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
        with translated(self.path), ExitStack() as closing:
            yield self._begun(closing)

    def _begun(self, closing: ExitStack) -> Connection:
        """A transaction that has the write lock: from there on nobody else is in its way."""
        writing, waited = self._engine.execution_options(write=True), False
        while True:
            try:
                with translated(self.path):
                    connection = closing.enter_context(writing.begin())
            except Busy as error:
                if self._patience is None:
                    raise
                self._patience(error)
                waited = True
            else:
                if waited and self._patience:
                    self._patience(None)
                return connection
