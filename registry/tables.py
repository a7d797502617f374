"""The tables. The columns that a record has carry the record's own field names, so that a row becomes one directly.

    home           one row: the base
    heads          the lines of merged models, and where each stands
    experts        everything that ever arrived; `id` is the arrival number
    versions       every version of every head; rows are never deleted, only marked as collected
    evaluations    what a command said of some weights
    interventions  what people did: rollbacks, promotions, blocks
    endpoints      who is told of events
    deliveries     what each of them was told, and is still to be told: the newest thousand
    tallies        how many experts have each status; triggers keep it

Nothing that is asked at every poll, arrival or request may read more rows the more experts there are: each such
question has an index here (`tests/registry/test_costs.py` counts). SQLite takes a partial index only where the query
says its condition in the same words.

What is written here must equal what the migrations build (a test compares them): a change is a new migration too.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar, TypeVar, cast

from sqlalchemy import (
    DDL,
    CheckConstraint,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Text,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from registry.records import (
    Deed,
    EndpointKind,
    Event,
    Flag,
    Outcome,
    RelativeTo,
    Score,
    Scores,
    Status,
    plain_scores,
)


class AnyText(TypeDecorator[str]):
    """Text. Lone surrogates, which a hostile tensor name can hold and UTF-8 cannot, are kept as escapes."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.encode("utf-8", "backslashreplace").decode("utf-8")


class UtcTime(TypeDecorator[datetime]):
    """A time with a zone, kept in UTC to the microsecond. One without a zone is a ValueError."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"the time {value} has no time zone")
        return value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class JsonObject(TypeDecorator[Mapping[str, Any]]):
    """A JSON object as text. Every finite float comes back bit for bit; NaN and infinity are a ValueError."""

    impl = Text  # SQLite would give a column declared JSON a numeric affinity
    cache_ok = True

    def process_bind_param(self, value: Mapping[str, Any] | None, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(dict(value), allow_nan=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any] | None:
        return None if value is None else cast(dict[str, Any], json.loads(value))


Word = TypeVar("Word", bound=StrEnum)


class EnumText(TypeDecorator[Word]):
    """One of a closed list of words, as that word."""

    impl = Text
    cache_ok = True

    def __init__(self, words: type[Word]) -> None:
        super().__init__()
        self.words = words

    def process_bind_param(self, value: Word | None, dialect: Dialect) -> str | None:
        return None if value is None else self.words(value).value

    def process_result_value(self, value: str | None, dialect: Dialect) -> Word | None:
        return None if value is None else self.words(value)


class ScoresText(TypeDecorator[Scores]):
    """Scores by task, as a JSON object of objects. Every finite float comes back bit for bit."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Scores | None, dialect: Dialect) -> str | None:
        if value is None:
            return None
        return json.dumps(plain_scores(value), allow_nan=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Scores | None:
        return None if value is None else {task: Score(**score) for task, score in json.loads(value).items()}


class Numbers(TypeDecorator[tuple[int, ...]]):
    """Whole numbers as a JSON list; NULL where there is none."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: tuple[int, ...] | None, dialect: Dialect) -> str | None:
        return json.dumps(list(value)) if value else None

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[int, ...]:
        return tuple(map(int, json.loads(value))) if value else ()


class Words(TypeDecorator[tuple[Word, ...]]):
    """Some of a closed list of words as a JSON list; NULL where there is none."""

    impl = Text
    cache_ok = True

    def __init__(self, words: type[Word]) -> None:
        super().__init__()
        self.words = words

    def process_bind_param(self, value: tuple[Word, ...] | None, dialect: Dialect) -> str | None:
        return json.dumps([self.words(word).value for word in value]) if value else None

    def process_result_value(self, value: str | None, dialect: Dialect) -> tuple[Word, ...]:
        return tuple(map(self.words, json.loads(value))) if value else ()


class Base(DeclarativeBase):
    """Holds the metadata of all tables."""

    type_annotation_map: ClassVar[dict[Any, Any]] = {
        str: AnyText,
        float: Double,
        datetime: UtcTime,
        Mapping[str, Any]: JsonObject,
        Status: EnumText(Status),
        RelativeTo: EnumText(RelativeTo),
        Deed: EnumText(Deed),
        Scores: ScoresText,
        tuple[int, ...]: Numbers,
        tuple[Flag, ...]: Words(Flag),
        tuple[Event, ...]: Words(Event),
        Event: EnumText(Event),
        EndpointKind: EnumText(EndpointKind),
        Outcome: EnumText(Outcome),
    }


class HomeRow(Base):
    """The one base of this home."""

    __tablename__ = "home"
    __table_args__ = (CheckConstraint("id = 1", name="home_is_one_row"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    sha256: Mapped[str]
    parameters: Mapped[int]
    size_bytes: Mapped[int]
    created_at: Mapped[datetime]


class HeadRow(Base):
    """One head. `position` keeps the order of creation."""

    __tablename__ = "heads"
    __table_args__ = (CheckConstraint("live >= 0 AND live <= newest", name="head_live_exists"),)

    name: Mapped[str] = mapped_column(primary_key=True)
    position: Mapped[int] = mapped_column(unique=True)
    method: Mapped[str]
    params: Mapped[Mapping[str, Any]]
    live: Mapped[int]
    newest: Mapped[int]
    frozen: Mapped[str | None]
    relative_to: Mapped[RelativeTo] = mapped_column(server_default="base")
    previous: Mapped[int | None]


class ExpertRow(Base):
    """One arrival and what became of it. Ids are never reused (AUTOINCREMENT): folders are named after them."""

    __tablename__ = "experts"
    __table_args__ = (
        CheckConstraint("status IN ('merged', 'duplicate', 'quarantined', 'withdrawn')", name="expert_status_known"),
        CheckConstraint(
            "(status IN ('merged', 'withdrawn')) = (version IS NOT NULL)", name="expert_merged_has_version"
        ),
        CheckConstraint("(status = 'withdrawn') = (withdrawn_in IS NOT NULL)", name="expert_withdrawn_has_version"),
        CheckConstraint("version IS NULL OR sha256 IS NOT NULL", name="expert_merged_has_sha256"),
        Index("experts_merged_once", "sha256", unique=True, sqlite_where=text("status = 'merged'")),
        Index("experts_content_once", "content_sha256", unique=True, sqlite_where=text("status = 'merged'")),
        Index(
            "experts_without_content",
            "content_sha256",  # first, or SQLite would take the unique index and read all that are NULL
            "norm",
            sqlite_where=text("status = 'merged' AND content_sha256 IS NULL"),
        ),
        Index("experts_one_a_version", "version", unique=True),
        Index("experts_by_status", "status", "id"),
        Index("experts_by_sha256", "sha256"),
        Index("experts_by_name", "name"),
        Index("experts_by_given_name", text("json_extract(about, '$.name')")),
        Index("experts_unplaced", "id", sqlite_where=text("place IS NULL")),
        Index("experts_lineage", "status", "version", "norm", sqlite_where=text("status = 'merged'")),
        Index("experts_flagged", "id", sqlite_where=text("flags IS NOT NULL")),
        Index("experts_blocked", "sha256", sqlite_where=text("blocked = 1")),
        Index("experts_blocked_content", "content_sha256", sqlite_where=text("blocked = 1")),
        Index("experts_open", "id", sqlite_where=text("status = 'quarantined' AND closed_at IS NULL")),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    kind: Mapped[str]
    sha256: Mapped[str | None]
    size_bytes: Mapped[int]
    status: Mapped[Status]
    received_at: Mapped[datetime]
    entry: Mapped[str]
    norm: Mapped[float | None]
    duplicate_of: Mapped[int | None] = mapped_column(ForeignKey("experts.id"))
    reason: Mapped[str | None]
    detail: Mapped[str | None]
    hint: Mapped[str | None]
    version: Mapped[int | None]
    finished_at: Mapped[datetime]
    place: Mapped[str | None]
    about: Mapped[Mapping[str, Any] | None]
    sidecars: Mapped[Mapping[str, Any] | None]
    withdrawn_in: Mapped[int | None]
    naming: Mapped[Mapping[str, Any] | None]
    content_sha256: Mapped[str | None]
    flags: Mapped[tuple[Flag, ...]] = mapped_column(nullable=True)
    trained_head: Mapped[str | None]
    trained_version: Mapped[int | None]
    verdict: Mapped[Mapping[str, Any] | None]
    blocked: Mapped[bool] = mapped_column(server_default=text("0"))
    closed_at: Mapped[datetime | None]
    evaluation: Mapped[int | None]


class VersionRow(Base):
    """One version of one head. Version 0 is the base: no parent, no expert. One that was rebuilt has no expert."""

    __tablename__ = "versions"
    __table_args__ = (
        ForeignKeyConstraint(["head", "parent"], ["versions.head", "versions.number"]),
        CheckConstraint(
            "(number = 0 AND parent IS NULL AND expert_id IS NULL) OR (number > parent AND parent >= 0)",
            name="version_has_parent",
        ),
        Index("versions_kept", "head", "number", sqlite_where=text("collected = 0")),
        Index(
            "versions_unneeded",
            "head",
            "number",
            sqlite_where=text("collected = 0 AND pinned = 0 AND trained = 0"),
        ),
        Index("versions_held", "head", "number", sqlite_where=text("held IS NOT NULL")),
        Index("versions_by_manifest", "head", "manifest_sha256"),
    )

    head: Mapped[str] = mapped_column(ForeignKey("heads.name"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    parent: Mapped[int | None]
    manifest_sha256: Mapped[str]
    size_bytes: Mapped[int]
    totals: Mapped[Mapping[str, Any]]
    figures: Mapped[Mapping[str, Any]]
    expert_id: Mapped[int | None] = mapped_column(ForeignKey("experts.id"))
    seconds: Mapped[float | None]
    created_at: Mapped[datetime]
    collected: Mapped[bool]
    held: Mapped[str | None]
    verdict: Mapped[Mapping[str, Any] | None]
    evaluation: Mapped[int | None]
    pinned: Mapped[bool] = mapped_column(server_default=text("0"))
    trained: Mapped[int] = mapped_column(server_default=text("0"))


class EvaluationRow(Base):
    """What a command said of some weights; both are known by their sha256."""

    __tablename__ = "evaluations"
    __table_args__ = (Index("evaluations_of_weights", "weights_sha256", "command_sha256"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    weights_sha256: Mapped[str]
    command_sha256: Mapped[str]
    scores: Mapped[Scores]
    seconds: Mapped[float]
    created_at: Mapped[datetime]


class InterventionRow(Base):
    """What a person did."""

    __tablename__ = "interventions"

    id: Mapped[int] = mapped_column(primary_key=True)
    deed: Mapped[Deed]
    who: Mapped[str]
    why: Mapped[str | None]
    head: Mapped[str | None]
    version: Mapped[int | None]
    previous: Mapped[int | None]
    experts: Mapped[tuple[int, ...]] = mapped_column(nullable=True)
    at: Mapped[datetime]


class EndpointRow(Base):
    """Somebody who is told of events."""

    __tablename__ = "endpoints"
    __table_args__ = (UniqueConstraint("kind", "target"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[EndpointKind]
    target: Mapped[str]
    events: Mapped[tuple[Event, ...]] = mapped_column(nullable=True)
    since: Mapped[datetime]
    dropped: Mapped[int]


class DeliveryRow(Base):
    """One event for one endpoint. Ids are never reused (AUTOINCREMENT): they are an endpoint's order."""

    __tablename__ = "deliveries"
    __table_args__ = (
        Index("deliveries_of", "endpoint", "id"),
        Index("deliveries_pending", "endpoint", "id", sqlite_where=text("outcome = 'pending'")),
        Index("deliveries_dead", "id", sqlite_where=text("outcome = 'dead'")),
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    endpoint: Mapped[int] = mapped_column(ForeignKey("endpoints.id"))
    message: Mapped[str]
    event: Mapped[Event]
    data: Mapped[Mapping[str, Any]]
    at: Mapped[datetime]
    outcome: Mapped[Outcome]
    attempts: Mapped[int]
    next_at: Mapped[datetime | None]
    tried_at: Mapped[datetime | None]
    answer: Mapped[str | None]


class TallyRow(Base):
    """How many experts have a status; no row where none ever had it."""

    __tablename__ = "tallies"

    status: Mapped[Status] = mapped_column(primary_key=True)
    experts: Mapped[int]


_ONE_MORE = (
    "INSERT INTO tallies (status, experts) VALUES (NEW.status, 1)"
    " ON CONFLICT (status) DO UPDATE SET experts = experts + 1;"
)
_ONE_LESS = "UPDATE tallies SET experts = experts - 1 WHERE status = OLD.status;"
TALLYING = (
    f"CREATE TRIGGER tally_insert AFTER INSERT ON experts BEGIN {_ONE_MORE} END",
    f"CREATE TRIGGER tally_update AFTER UPDATE OF status ON experts BEGIN {_ONE_LESS} {_ONE_MORE} END",
    f"CREATE TRIGGER tally_delete AFTER DELETE ON experts BEGIN {_ONE_LESS} END",
)
"""They go with the table `experts`: a migration that makes it anew makes them anew."""

for _trigger in TALLYING:
    event.listen(Base.metadata, "after_create", DDL(_trigger))  # type: ignore[no-untyped-call]
