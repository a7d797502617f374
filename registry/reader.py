"""Questions to the registry, read-only: from any number of threads and processes, while somebody writes or not.

Every method is one transaction: it sees one state of the database.
"""

from collections.abc import Collection, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, Select, column, func, select, table

from registry import migrations
from registry.engine import REBUILD_HINT, check, connect, examine, reading, translated
from registry.errors import Damaged, WrongRevision
from registry.records import (
    BaseModel,
    Deed,
    Evaluation,
    Expert,
    Flag,
    Head,
    Intervention,
    Status,
    Version,
)
from registry.statements import (
    Record,
    blocked_as,
    called,
    experts_in,
    fetch,
    is_blocked,
    is_kept,
    is_merged,
    is_open,
    is_unneeded,
    lineage_after,
    merged_as,
    merged_content,
    newest_experts,
)
from registry.tables import EvaluationRow, ExpertRow, HeadRow, HomeRow, InterventionRow, TallyRow, VersionRow

PAGE = 1000  # ids in one question


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
            return connection.execute(select(func.count()).select_from(ExpertRow).where(is_open)).scalar_one()

    def count_held(self, head: Head) -> int:
        """How many versions of a head are newer than the live one, and were not let live."""
        held = VersionRow.head == head.name, VersionRow.number > head.live, VersionRow.held.is_not(None)
        with self._read() as connection:
            return connection.execute(select(func.count()).select_from(VersionRow).where(*held)).scalar_one()

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
