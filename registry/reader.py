"""Questions to the registry, read-only: from any number of threads and processes, while somebody writes or not.

Every method is one transaction: it sees one state of the database.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, Select, column, func, select, table

from registry import migrations
from registry.engine import REBUILD_HINT, check, connect, examine, reading, translated
from registry.errors import Damaged, WrongRevision
from registry.records import (
    BaseModel,
    Deed,
    Delivery,
    Endpoint,
    Evaluation,
    Event,
    Expert,
    Flag,
    Head,
    Intervention,
    Outcome,
    Status,
    Version,
)
from registry.statements import (
    Record,
    beginning,
    blocked_as,
    called,
    count,
    experts_in,
    fetch,
    is_blocked,
    is_dead,
    is_kept,
    is_merged,
    is_open,
    is_pending,
    is_unneeded,
    lineage_after,
    merged_as,
    merged_content,
    newest_experts,
)
from registry.tables import (
    DeliveryRow,
    EndpointRow,
    EvaluationRow,
    ExpertRow,
    HeadRow,
    HomeRow,
    InterventionRow,
    TallyRow,
    VersionRow,
)

PAGE = 1000  # ids in one question

Timed = Callable[[str, float], object]
"""Hears of each transaction, once it has ended: "read" or "write", and how many seconds it took, waiting included."""


class Reader:
    """Questions to a registry, read-only and safe to share between threads. Close it, or use it in `with`."""

    timed: Timed | None = None  # set it on the instance

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

    def version_of(self, head: str, manifest_sha256: str) -> Version | None:
        """The version of a head whose manifest has that sha256, or one that begins so; the newest of several."""
        begins_so = VersionRow.manifest_sha256.between(manifest_sha256, f"{manifest_sha256}g")
        query = select(VersionRow).where(VersionRow.head == head, begins_so)
        return self._one(Version, query.order_by(VersionRow.number.desc()).limit(1))

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

    def experts_of(self, versions: Iterable[Version]) -> dict[int, Expert]:
        """The experts that these versions came with, PAGE of them at the most, by their ids."""
        wanted = sorted({one.expert_id for one in versions if one.expert_id is not None})[-PAGE:]
        found = self._all(Expert, select(ExpertRow).where(ExpertRow.id.in_(wanted))) if wanted else []
        return {one.id: one for one in found}

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

    def search(self, words: str, limit: int) -> list[Expert]:
        """The expert with that id, and those whose name, as dropped or in their expert.json, or whose sha256 (4 digits
        or more) begins so: the first `limit` of each kind at the most. The newest come first.
        """
        found = [self._all(Expert, query.limit(limit)) for query in beginning(words)]
        if words.isascii() and words.isdigit() and len(words) < 19 and (one := self.expert(int(words))):
            found.append([one])
        return sorted({one.id: one for some in found for one in some}.values(), key=lambda one: -one.id)

    def dropped_as(self, name: str) -> Expert | None:
        """The newest expert that was dropped under exactly that name."""
        query = select(ExpertRow).where(ExpertRow.name == name).order_by(ExpertRow.id.desc()).limit(1)
        return self._one(Expert, query)

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

    def blocked(self, sha256: str, content_sha256: str | None) -> Expert | None:
        """The expert, newest first, with those bytes, or that does the same to the base, that may not come back."""
        return self._one(Expert, blocked_as(sha256, content_sha256))

    def kept_out(self) -> list[Expert]:
        """Every expert that may not come back, oldest first."""
        return self._all(Expert, select(ExpertRow).where(is_blocked).order_by(ExpertRow.id))

    def quarantined(self, limit: int = 100, before: int | None = None) -> list[Expert]:
        """The experts that were refused and that somebody has still to look after, newest first."""
        query = select(ExpertRow).where(is_open).order_by(ExpertRow.id.desc()).limit(limit)
        return self._all(Expert, query if before is None else query.where(ExpertRow.id < before))

    def evaluation(self, evaluation_id: int | None) -> Evaluation | None:
        """One evaluation."""
        return self._one(Evaluation, select(EvaluationRow).where(EvaluationRow.id == evaluation_id))

    def evaluations(self, ids: Iterable[int | None]) -> dict[int, Evaluation]:
        """These evaluations by their ids; None among the ids is none."""
        wanted = sorted({one for one in ids if one is not None})
        pages = (wanted[at : at + PAGE] for at in range(0, len(wanted), PAGE))
        found = [self._all(Evaluation, select(EvaluationRow).where(EvaluationRow.id.in_(page))) for page in pages]
        return {one.id: one for page in found for one in page}

    def last_evaluation_id(self) -> int:
        """The highest id of an evaluation; 0 where none was made yet."""
        with self._read() as connection:
            return connection.execute(select(func.max(EvaluationRow.id))).scalar() or 0

    def evaluated(self, weights_sha256: str, command_sha256: str) -> Evaluation | None:
        """The newest evaluation of these weights by that command."""
        same = EvaluationRow.weights_sha256 == weights_sha256, EvaluationRow.command_sha256 == command_sha256
        return self._one(Evaluation, select(EvaluationRow).where(*same).order_by(EvaluationRow.id.desc()).limit(1))

    def interventions(self, limit: int = 100, before: int | None = None) -> list[Intervention]:
        """What people did, newest first; the next page is what lies `before` the last id of this one."""
        query = select(InterventionRow).order_by(InterventionRow.id.desc()).limit(limit)
        return self._all(Intervention, query if before is None else query.where(InterventionRow.id < before))

    def endpoints(self) -> list[Endpoint]:
        """Who is told of events."""
        return self._all(Endpoint, select(EndpointRow).order_by(EndpointRow.id))

    def deliveries(self, limit: int = 100, before: int | None = None, outcome: Outcome | None = None) -> list[Delivery]:
        """What was told, and is to be told, newest first; the next page is what lies `before` the last id of this."""
        query = select(DeliveryRow).order_by(DeliveryRow.id.desc()).limit(limit)
        query = query if before is None else query.where(DeliveryRow.id < before)
        which = {Outcome.DEAD: is_dead, Outcome.PENDING: is_pending}
        if outcome is not None:
            query = query.where(which.get(outcome, DeliveryRow.outcome == outcome))
        return self._all(Delivery, query)

    def delivery(self, delivery_id: int) -> Delivery | None:
        """One delivery."""
        return self._one(Delivery, select(DeliveryRow).where(DeliveryRow.id == delivery_id))

    def pending(self, endpoint_id: int, limit: int) -> list[Delivery]:
        """What an endpoint is still to be told, in order."""
        query = select(DeliveryRow).where(DeliveryRow.endpoint == endpoint_id, is_pending)
        return self._all(Delivery, query.order_by(DeliveryRow.id).limit(limit))

    def last_told(self, events: Collection[Event]) -> Event | None:
        """Which of these events anybody was told of, or is to be, last."""
        query = select(DeliveryRow).where(DeliveryRow.event.in_(events)).order_by(DeliveryRow.id.desc()).limit(1)
        found = self._one(Delivery, query)
        return found.event if found else None

    def count_undelivered(self) -> tuple[int, int]:
        """How many deliveries are pending, and how many are dead."""
        with self._read() as connection:
            return count(connection, DeliveryRow, is_pending), count(connection, DeliveryRow, is_dead)

    def count_interventions(self, after: int = 0) -> tuple[dict[Deed, int], int]:
        """How often people did each thing since the intervention with the id `after`, and the id of the last one."""
        counted = InterventionRow.deed, func.count(InterventionRow.id), func.max(InterventionRow.id)
        query = select(*counted).where(InterventionRow.id > after).group_by(InterventionRow.deed)
        with self._read() as connection:
            rows = connection.execute(query).all()
        return {deed: count for deed, count, _ in rows}, max((last for _, _, last in rows), default=after)

    def count_open(self) -> int:
        """How many refused experts somebody has still to look after."""
        with self._read() as connection:
            return count(connection, ExpertRow, is_open)

    def count_held(self, head: Head) -> int:
        """How many versions of a head are newer than the live one, and were not let live."""
        held = VersionRow.head == head.name, VersionRow.number > head.live, VersionRow.held.is_not(None)
        with self._read() as connection:
            return count(connection, VersionRow, *held)

    def kept(self, head: str) -> tuple[int, int]:
        """How many versions of a head have their files kept, and the bytes of those."""
        kept = select(func.count(), func.coalesce(func.sum(VersionRow.size_bytes), 0)).where(
            VersionRow.head == head, is_kept
        )
        with self._read() as connection:
            versions, size_bytes = connection.execute(kept).one()
        return versions, size_bytes

    def unneeded(self, head: Head, limit: int) -> list[Version]:
        """The oldest versions of a head that nothing asks to keep: neither base nor live nor live before, not pinned,
        and no merged expert's training began with them.
        """
        number = VersionRow.number
        query = select(VersionRow).where(
            VersionRow.head == head.name, is_unneeded, number.not_in((0, head.live, head.previous or 0))
        )
        return self._all(Version, query.order_by(number).limit(limit))

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
        with self._clocked("read"), translated(self.path), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _clocked(self, kind: str) -> Iterator[None]:
        begun = perf_counter()
        try:
            yield
        finally:
            if self.timed:
                self.timed(kind, perf_counter() - begun)

    def _all(self, kind: type[Record], query: Select[Any]) -> list[Record]:
        with self._read() as connection:
            try:
                return fetch(connection, kind, query)
            except (ValueError, TypeError, OverflowError) as error:  # a value that none of ours can be
                raise Damaged(f"{self.path}: {error}", REBUILD_HINT) from error

    def _one(self, kind: type[Record], query: Select[Any]) -> Record | None:
        return next(iter(self._all(kind, query)), None)
