"""The registry's one writer, which also answers what a `Reader` does; nobody else begins a transaction that writes.

Every method is one transaction: it sees one state of the database, and changes it wholly or not at all. After
`StorageFailed` a writer must be closed and not be asked again: only a new start tells what the disk holds.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Connection, Update, insert, select, update

from registry import migrations, outbox
from registry.engine import APPLICATION_ID, check, connect, examine, translated, writing
from registry.errors import AlreadyMerged, AlreadyThere, BadRecord, Busy, StorageFailed
from registry.reader import Reader
from registry.records import (
    LEARNED,
    BaseModel,
    Delivery,
    Endpoint,
    Evaluation,
    Expert,
    Happening,
    Head,
    NewEndpoint,
    NewEvaluation,
    NewExpert,
    NewIntervention,
    NewVersion,
    Status,
)
from registry.statements import (
    PROGRAM_HINT,
    advance,
    block_withdrawn,
    columns,
    count_trained,
    experts_after_live,
    fetch,
    insert_blocked,
    insert_expert,
    insert_head,
    insert_intervention,
    insert_versions,
    is_blocked,
    is_kept,
    is_known,
    is_open,
    is_unneeded,
    merged_as,
    merged_content,
    require_one_each,
    turn,
    withdraw,
)
from registry.tables import EvaluationRow, ExpertRow, HeadRow, HomeRow, VersionRow

Patience = Callable[[Busy | None], None]
"""Hears that another program holds the registry, as long as it does, and may raise to give up; None once it is over."""


class Store(Reader):
    """The single writer. Opening it upgrades an older layout, after a backup beside it."""

    _patience: Patience | None = None
    _failed: StorageFailed | None = None  # what is on the disk is unknown since then
    committed: Callable[[], object] = staticmethod(lambda: None)
    """Is called after each transaction: there may be something to tell to others."""

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

        `versions` holds one version for each head, all with the same number. One becomes live unless it is held, or its
        head frozen. Raises StaleHead unless every head's newest version is the new one's parent, and its number one
        below; AlreadyMerged when these bytes or tensors are in the lineage; BadRecord; or an error of the disk.
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
            kept = [advance(connection, version) for version in versions]
            merged = insert_expert(connection, expert, versions[0].number, now)
            insert_versions(connection, kept, merged.id, now)
            count_trained(connection, [merged.id], 1)
            connection.execute(
                update(ExpertRow).where(is_open, ~is_blocked, ExpertRow.name == expert.name).values(closed_at=now)
            )
            outbox.announce(connection, [outbox.of_version(version, merged) for version in kept], now)
        return merged

    def restate(
        self,
        versions: Sequence[NewVersion],
        withdrawn: Sequence[int] = (),
        intervention: NewIntervention | None = None,
        learned: Collection[str] = (),
        waiting: Collection[str] = (),
        passed: Collection[str] = (),
    ) -> None:
        """Every head is at a new version that folds no new expert; those withdrawn are in none of them any more, and
        blocked. It is live, and nothing is frozen any more, unless it has an expert that came after the live version
        and is held with it.

        A version that is held already stays so, and its head as it stands. So does a head that a person rolled back,
        unless an expert is withdrawn. learned: the heads whose coefficients were learned: they are frozen again.
        waiting: those to which nothing was done: what is frozen stays so. passed: those whose version was judged and
        is good, with all its experts: as an arrival's it is live.

        THE COMMIT POINT of such a version. Raises as `commit` does, and BadRecord where an expert is not merged.
        """
        now = datetime.now(UTC)
        with self._write() as connection:
            heads = {head.name: head for head in fetch(connection, Head, select(HeadRow))}
            require_one_each([*heads.values()], versions)
            kept = []
            for version in versions:
                rolled_back = heads[version.head].frozen not in (None, LEARNED)
                if version.held or version.head in waiting or (rolled_back and not withdrawn):
                    kept.append(advance(connection, version))
                    continue
                later = experts_after_live(connection, version.head) - set(withdrawn)
                good = version.head in passed and not rolled_back
                why = f"it still has expert {max(later)}, which is not live" if later and not good else None
                then = LEARNED if version.head in learned else None
                kept.append(advance(connection, replace(version, held=why), thaw=why is None, then=then))
            insert_versions(connection, kept, None, now)
            withdraw(connection, withdrawn, versions[0].number)
            change = replace(intervention, version=versions[0].number) if intervention else None
            if change:
                insert_intervention(connection, change, now)
            outbox.announce(connection, [outbox.of_version(version, change=change) for version in kept], now)

    def turn(self, head: str, number: int, intervention: NewIntervention, frozen: str | None = None) -> Head:
        """Another version of the head is live from here on; returns the head as it stands then.

        frozen: why no later version becomes live by itself. Raises BadRecord where the version's files are not kept.
        """
        now = datetime.now(UTC)
        with self._write() as connection:
            before = turn(connection, head, number, frozen)
            turned = replace(intervention, head=head, version=number, previous=before)
            insert_intervention(connection, turned, now)
            outbox.announce(connection, outbox.of_turn(turned), now)
            return fetch(connection, Head, select(HeadRow).where(HeadRow.name == head))[0]

    def block(self, expert_ids: Sequence[int], blocked: bool, intervention: NewIntervention) -> None:
        """These experts may not come back, or may again, when the same weights arrive."""
        rows = update(ExpertRow).where(ExpertRow.id.in_(expert_ids))
        self._intervene(rows.values(blocked=blocked), len(expert_ids), intervention)

    def keep_out(self, experts: Sequence[NewExpert], intervention: NewIntervention) -> list[Expert]:
        """Blocks experts that never came here; returns those of which nothing was known. No file of them is anywhere.

        The intervention names them. Nothing is changed where all of them are known.
        """
        now = datetime.now(UTC)
        with self._write() as connection:
            kept = [insert_blocked(connection, one, now) for one in experts if not is_known(connection, one)]
            if kept:
                named = replace(intervention, experts=tuple(one.id for one in kept))
                insert_intervention(connection, named, now)
        return kept

    def block_withdrawn(self) -> int:
        """Blocks what was withdrawn before blocks were known, and that nobody has unblocked since; says how many."""
        with self._write() as connection:
            return block_withdrawn(connection)

    def pin(self, head: str, number: int, pinned: bool, intervention: NewIntervention) -> None:
        """The version's files stay, or may go by retention again. Raises BadRecord where they are not kept."""
        rows = update(VersionRow).where(VersionRow.head == head, VersionRow.number == number, is_kept)
        self._intervene(rows.values(pinned=pinned), 1, intervention)

    def close_case(self, expert_id: int, intervention: NewIntervention) -> None:
        """Nobody has to look after that refused expert any more. Raises BadRecord where it was not refused."""
        rows = update(ExpertRow).where(ExpertRow.id == expert_id, ExpertRow.status == Status.QUARANTINED)
        self._intervene(rows.values(closed_at=datetime.now(UTC)), 1, intervention)

    def intervened(self, intervention: NewIntervention) -> None:
        """Notes what a person did, where that changed nothing here."""
        with self._write() as connection:
            insert_intervention(connection, intervention, datetime.now(UTC))

    def _intervene(self, change: Update, rows: int, intervention: NewIntervention) -> None:
        with self._write() as connection:
            if (found := connection.execute(change).rowcount) != rows:
                raise BadRecord(f"{intervention.deed}: {found} of {rows} rows are there", PROGRAM_HINT)
            insert_intervention(connection, intervention, datetime.now(UTC))

    def evaluate(self, evaluation: NewEvaluation) -> Evaluation:
        """Keeps an evaluation."""
        row = insert(EvaluationRow).values(**columns(NewEvaluation, evaluation), created_at=datetime.now(UTC))
        with self._write() as connection:
            key = connection.execute(row.returning(EvaluationRow.id)).scalar_one()
            return fetch(connection, Evaluation, select(EvaluationRow).where(EvaluationRow.id == key))[0]

    def judge_version(self, head: str, number: int, evaluation_id: int) -> None:
        """Notes that this evaluation is the version's."""
        row = update(VersionRow).where(VersionRow.head == head, VersionRow.number == number)
        with self._write() as connection:
            connection.execute(row.values(evaluation=evaluation_id))

    def rejudge(self, head: str, number: int, verdict: Mapping[str, Any], held: str | None) -> None:
        """Another verdict on a version. held: where it is held, why it is from here on; None: why it was."""
        row = update(VersionRow).where(VersionRow.head == head, VersionRow.number == number)
        with self._write() as connection:
            connection.execute(row.values(verdict=verdict))
            if held is not None:
                connection.execute(row.where(VersionRow.held.is_not(None)).values(held=held))

    def judge_expert(self, expert_id: int, evaluation_id: int) -> None:
        """Notes that this evaluation is that of the expert by itself."""
        with self._write() as connection:
            connection.execute(update(ExpertRow).where(ExpertRow.id == expert_id).values(evaluation=evaluation_id))

    def adopt(self, head: Head, versions: Sequence[NewVersion]) -> None:
        """A further head, with version 0 and the one it stands at. Raises BadRecord unless that is the others' newest.

        THE COMMIT POINT of a head that is added to a home.
        """
        now = datetime.now(UTC)
        with self._write() as connection:
            newest = {one.newest for one in fetch(connection, Head, select(HeadRow))}
            if newest != {head.newest} or {version.number for version in versions} != {0, head.live, head.newest}:
                raise BadRecord(f"head {head.name} stands at {head.newest}, the others at {newest}", PROGRAM_HINT)
            insert_head(connection, head)
            insert_versions(connection, versions, None, now)
            told = [outbox.of_version(one) for one in versions if one.number == head.live or one.held]
            outbox.announce(connection, told, now)

    def record(self, expert: NewExpert) -> Expert:
        """Keeps an expert that was refused or is a duplicate. Raises RegistryError."""
        if expert.status is Status.MERGED:
            raise BadRecord(f"{expert.name}: a merged expert must be committed with its versions", PROGRAM_HINT)
        now = datetime.now(UTC)
        with self._write() as connection:
            recorded = insert_expert(connection, expert, None, now)
            outbox.announce(connection, outbox.of_expert(expert, recorded.id), now)
            return recorded

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
        """Notes that the version's files were removed. Raises BadRecord for an unknown version, one that is live or the
        newest, and one that is pinned.
        """
        stays = select(HeadRow.live, HeadRow.newest, HeadRow.previous).where(HeadRow.name == head)
        row = update(VersionRow).where(VersionRow.head == head, VersionRow.number == number)
        with self._write() as connection:
            needed = connection.execute(stays).one_or_none() or ()
            changed = row.where(is_unneeded).values(collected=True)
            if number in needed or connection.execute(changed).rowcount != 1:
                raise BadRecord(f"head {head} has no version {number} that may go", PROGRAM_HINT)

    def follow_endpoints(self, wanted: Sequence[NewEndpoint]) -> list[Endpoint]:
        """From here on these are told of events, and nobody else; what others were still to be told goes."""
        with self._write() as connection:
            return outbox.follow(connection, wanted, datetime.now(UTC))

    def announce(self, happening: Happening) -> None:
        """Has it told to whoever hears of such an event."""
        with self._write() as connection:
            outbox.announce(connection, [happening], datetime.now(UTC))

    def note_deliveries(self, deliveries: Sequence[Delivery]) -> None:
        """Keeps what became of these."""
        with self._write() as connection:
            outbox.note(connection, deliveries)

    def redeliver(self, ids: Sequence[int] | None) -> int:
        """These are to be delivered once more, or, of None, all that are dead; how many they are."""
        with self._write() as connection:
            return outbox.repeat(connection, ids)

    def checkpoint(self) -> None:
        """Moves the whole write-ahead log into the database file, synced. Raises Busy when a reader is in the way."""
        with translated(self.path), closing(self._engine.raw_connection()) as raw:
            busy, _, _ = raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise Busy(f"{self.path}: the write-ahead log is in use", "close what reads the registry, then try again")

    def fail(self, error: StorageFailed) -> None:
        """From here on every change raises that: another writer of this process met it."""
        self._failed = error

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        if self._failed:
            raise self._failed
        try:
            with self._clocked("write"), translated(self.path), ExitStack() as closing:
                yield self._begun(closing)
        except StorageFailed as error:
            self._failed = error
            raise
        self.committed()

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
