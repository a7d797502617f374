"""The statements of the store's transactions: each works on a connection whose transaction the store has begun."""

import re
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Text,
    and_,
    case,
    func,
    insert,
    literal_column,
    or_,
    select,
    type_coerce,
    union,
    union_all,
    update,
)

from registry.errors import BadRecord, StaleHead
from registry.records import (
    LEARNED,
    BaseModel,
    Deed,
    Delivery,
    Endpoint,
    Evaluation,
    Expert,
    Flag,
    Head,
    Intervention,
    NewExpert,
    NewIntervention,
    NewVersion,
    Status,
    Version,
)
from registry.tables import AnyText, Base, DeliveryRow, ExpertRow, HeadRow, InterventionRow, VersionRow

Record = TypeVar("Record", BaseModel, Head, Expert, Version, Evaluation, Intervention, Endpoint, Delivery)

# These in the words of the indexes: with bound values in them SQLite would not take the index.
given_name = func.json_extract(ExpertRow.about, literal_column("'$.name'"), type_=AnyText())  # in its expert.json
is_merged = ExpertRow.status == literal_column("'merged'")
is_blocked = ExpertRow.blocked == literal_column("1")
is_open = and_(ExpertRow.status == literal_column("'quarantined'"), ExpertRow.closed_at.is_(None))
is_kept = VersionRow.collected == literal_column("0")
is_unneeded = and_(is_kept, *(column == literal_column("0") for column in (VersionRow.pinned, VersionRow.trained)))
is_pending = DeliveryRow.outcome == literal_column("'pending'")
is_dead = DeliveryRow.outcome == literal_column("'dead'")
NOWHERE = ""  # the place of an expert that never came
_LAST = "\U0010ffff"  # behind every letter
PROGRAM_HINT = "this is a fault in the program: please report it"


def merged_as(sha256: str) -> Select[Any]:
    """The merged expert with those bytes."""
    return select(ExpertRow).where(ExpertRow.sha256 == sha256, is_merged)


def merged_content(content_sha256: str) -> Select[Any]:
    """The merged expert that does the same to the base, bit for bit, in whatever files."""
    return select(ExpertRow).where(ExpertRow.content_sha256 == content_sha256, is_merged)


def blocked_as(sha256: str, content_sha256: str | None) -> Select[Any]:
    """The newest expert with those bytes, or that does the same to the base, that may not come back."""
    same = [ExpertRow.sha256 == sha256, ExpertRow.content_sha256 == content_sha256][: 2 if content_sha256 else 1]
    ids = [select(ExpertRow.id).where(one, is_blocked) for one in same]
    return select(ExpertRow).where(ExpertRow.id.in_(union_all(*ids))).order_by(ExpertRow.id.desc()).limit(1)


def called(words: str) -> ColumnElement[bool]:
    """It has exactly that name, as dropped or in its expert.json, or a sha256 that begins so (4 digits or more)."""
    wanted = or_(ExpertRow.name == words, given_name == words)
    begins = words.lower()
    if 4 <= len(begins) <= 64 and set(begins) <= set("0123456789abcdef"):
        # a range, which an index can answer: what comes after every digest that begins so is "g"
        return or_(wanted, and_(ExpertRow.sha256 >= begins, ExpertRow.sha256 < f"{begins}g"))
    return wanted


def beginning(words: str) -> list[Select[Any]]:
    """Experts whose dropped name, given name or sha256 begins so, each in the order of an index."""
    queries = [
        select(ExpertRow).where(word >= words, word < f"{words}{_LAST}").order_by(word)
        for word in (ExpertRow.name, given_name)
    ]
    digits = words.lower()
    if 4 <= len(digits) <= 64 and set(digits) <= set("0123456789abcdef"):
        known = ExpertRow.sha256 >= digits, ExpertRow.sha256 < f"{digits}g"
        queries.append(select(ExpertRow).where(*known).order_by(ExpertRow.sha256))
    return queries


def count(connection: Connection, row: type[Base], *which: ColumnElement[bool]) -> int:
    """How many rows there are of these."""
    return connection.execute(select(func.count()).select_from(row).where(*which)).scalar_one()


def lineage_after(version: int, limit: int | None) -> Select[Any]:
    """The merged experts that came with a later version than that, in the order of merging."""
    query = select(ExpertRow).where(is_merged, ExpertRow.version > version)
    return query.order_by(ExpertRow.version).limit(limit)


def experts_in(number: int, after: int, limit: int | None) -> Select[Any]:
    """The experts that version `number` has, of those that came with a later one than `after`, as they were merged."""
    came = ExpertRow.version > after, ExpertRow.version <= number
    there = or_(ExpertRow.withdrawn_in.is_(None), ExpertRow.withdrawn_in > number)
    return select(ExpertRow).where(*came, there).order_by(ExpertRow.version).limit(limit)


def _matches(glob: str) -> ColumnElement[bool]:
    """Its name, as dropped or in its expert.json, matches; by the indexes where the glob begins with letters."""
    begins = re.split(r"[*?\[]", glob, maxsplit=1)[0]
    if not begins:
        return or_(ExpertRow.name.op("GLOB")(glob), given_name.op("GLOB")(glob))
    ids = [
        select(ExpertRow.id).where(
            word == glob if begins == glob else and_(word >= begins, word < f"{begins}{_LAST}", word.op("GLOB")(glob))
        )
        for word in (ExpertRow.name, given_name)
    ]
    return ExpertRow.id.in_(union(*ids))


def newest_experts(
    status: Status | None, limit: int, before: int | None, name: str | None, flags: Collection[Flag]
) -> Select[Any]:
    """The newest experts first: of that status, with an id below `before`, with a name that matches the glob `name`,
    with one of these flags, if any are given.
    """
    query = select(ExpertRow).order_by(ExpertRow.id.desc()).limit(limit)
    if status is not None:
        query = query.where(ExpertRow.status == status)
    if before is not None:
        query = query.where(ExpertRow.id < before)
    if name is not None:
        query = query.where(_matches(name))
    if flags:
        words = type_coerce(ExpertRow.flags, Text)
        query = query.where(ExpertRow.flags.is_not(None), or_(*(words.contains(f'"{flag}"') for flag in flags)))
    return query


def columns(kind: type, record: object) -> dict[str, Any]:
    """The columns that a record of this kind has."""
    return {field.name: getattr(record, field.name) for field in fields(kind)}


def fetch(connection: Connection, kind: type[Record], query: Select[Any]) -> list[Record]:
    """What the query finds, as records."""
    names = [field.name for field in fields(kind)]
    return [kind(**{name: row[name] for name in names}) for row in connection.execute(query).mappings()]


def require_one_each(heads: Sequence[Head], versions: Sequence[NewVersion]) -> None:
    """Raises BadRecord unless there is one version, all with the same number, for each head."""
    names = sorted(head.name for head in heads)
    if not names or names != sorted(version.head for version in versions) or len({v.number for v in versions}) != 1:
        raise BadRecord(f"there must be one version, of the same number, for each of the heads {names}", PROGRAM_HINT)


def advance(connection: Connection, version: NewVersion, *, thaw: bool = False, then: str | None = None) -> NewVersion:
    """Moves a head on to its new version, and returns that as it is to be kept: one that would become live is held
    where the head is frozen. thaw: the head is frozen no more, and the version live in any case; then: it is
    frozen by that from the next version on. Raises StaleHead unless the head stands where the version expects it.
    """
    at_parent = HeadRow.name == version.head, HeadRow.newest == version.parent, HeadRow.newest == version.number - 1
    frozen = connection.execute(select(HeadRow.frozen).where(HeadRow.name == version.head)).scalar()
    kept = version if thaw or version.held else replace(version, held=frozen)
    values: dict[str, Any] = {"newest": version.number, "frozen": then if thaw else frozen}
    if not kept.held:
        jumps = HeadRow.live != version.number - 1
        values |= {"live": version.number, "previous": case((jumps, HeadRow.live), else_=HeadRow.previous)}
    if connection.execute(update(HeadRow).where(*at_parent).values(values)).rowcount != 1:
        raise StaleHead(
            f"head {version.head} is no longer at version {version.parent}: version {version.number} cannot follow",
            "fold the expert again, onto the version that is the newest now",
        )
    return kept


def experts_after_live(connection: Connection, head: str) -> set[int]:
    """The merged experts that came with a version after the head's live one, and are not held with it only because
    nobody has learned their coefficients."""
    live = select(HeadRow.live).where(HeadRow.name == head).scalar_subquery()
    unlearned = select(VersionRow.number).where(VersionRow.head == head, VersionRow.held == LEARNED)
    later = select(ExpertRow.id).where(is_merged, ExpertRow.version > live, ExpertRow.version.not_in(unlearned))
    return set(connection.scalars(later))


def turn(connection: Connection, head: str, number: int, frozen: str | None) -> int:
    """Lets a version that is kept be the head's live one; returns the one that was live before. Raises BadRecord."""
    there = select(VersionRow.number).where(VersionRow.head == head, VersionRow.number == number, is_kept)
    before = connection.execute(select(HeadRow.live).where(HeadRow.name == head)).scalar()
    if before is None or connection.execute(there).first() is None:
        raise BadRecord(f"head {head} has no version {number} whose files are kept", "`mainstem log` lists versions")
    connection.execute(update(HeadRow).where(HeadRow.name == head).values(live=number, frozen=frozen, previous=before))
    version = update(VersionRow).where(VersionRow.head == head, VersionRow.number == number)
    connection.execute(version.values(held=None))
    return int(before)


def insert_intervention(connection: Connection, intervention: NewIntervention, now: datetime) -> None:
    """A row for what a person did."""
    connection.execute(insert(InterventionRow).values(**columns(NewIntervention, intervention), at=now))


def insert_expert(connection: Connection, expert: NewExpert, version: int | None, now: datetime) -> Expert:
    """A row for an arrival, and what became of it."""
    blocked = expert.status is Status.QUARANTINED and expert.verdict is not None
    return _inserted(connection, expert, version=version, finished_at=now, place=None, blocked=blocked)


def is_known(connection: Connection, expert: NewExpert) -> bool:
    """Whether these bytes ever came here."""
    return connection.execute(select(ExpertRow.id).where(ExpertRow.sha256 == expert.sha256)).first() is not None


def insert_blocked(connection: Connection, expert: NewExpert, now: datetime) -> Expert:
    """A row for an expert that never came here, and may not."""
    return _inserted(connection, expert, finished_at=now, place=NOWHERE, blocked=True)


def _inserted(connection: Connection, expert: NewExpert, **known: object) -> Expert:
    row = insert(ExpertRow).values(**columns(NewExpert, expert), **known)
    key = connection.execute(row.returning(ExpertRow.id)).scalar_one()  # RETURNING can give an integer for a float
    return fetch(connection, Expert, select(ExpertRow).where(ExpertRow.id == key))[0]


def block_withdrawn(connection: Connection) -> int:
    """Blocks what was withdrawn and is not blocked, unless somebody unblocked it; says how many."""
    named = func.json_each(InterventionRow.experts).table_valued("value", joins_implicitly=True)
    unblocked = select(named.c.value).where(InterventionRow.deed == Deed.UNBLOCK)
    rows = update(ExpertRow).where(ExpertRow.status == Status.WITHDRAWN, ~is_blocked, ExpertRow.id.not_in(unblocked))
    return connection.execute(rows.values(blocked=True)).rowcount


def insert_head(connection: Connection, head: Head) -> None:
    """A row for a head, behind those that are there."""
    position = connection.execute(select(func.count()).select_from(HeadRow)).scalar_one()
    connection.execute(insert(HeadRow).values(position=position, **columns(Head, head)))


def withdraw(connection: Connection, expert_ids: Sequence[int], number: int) -> None:
    """Notes that these merged experts went with version `number`: they do not come back by themselves. Raises BadRecord
    where one of them is not merged.
    """
    rows = update(ExpertRow).where(ExpertRow.id.in_(expert_ids), ExpertRow.status == Status.MERGED)
    gone = connection.execute(rows.values(status=Status.WITHDRAWN, withdrawn_in=number, blocked=True))
    count_trained(connection, expert_ids, -1)
    if gone.rowcount != len(expert_ids):
        raise BadRecord(f"of the experts {list(expert_ids)} only {gone.rowcount} are merged", PROGRAM_HINT)


def count_trained(connection: Connection, expert_ids: Sequence[int], change: int) -> None:
    """Notes at each version from which these experts were trained that so many more merged ones were."""
    query = select(ExpertRow.trained_head, ExpertRow.trained_version).where(ExpertRow.id.in_(expert_ids))
    for head, number in connection.execute(query.where(ExpertRow.trained_head.is_not(None))).all():
        row = update(VersionRow).where(VersionRow.head == head, VersionRow.number == number)
        connection.execute(row.values(trained=VersionRow.trained + change))


def insert_versions(
    connection: Connection, versions: Sequence[NewVersion], expert_id: int | None, now: datetime
) -> None:
    """A row for each version; `expert_id` is the expert that they fold, None where they fold none."""
    for version in versions:
        row = columns(NewVersion, version)
        kept = {"expert_id": expert_id, "created_at": now, "collected": False, "pinned": False, "trained": 0}
        connection.execute(insert(VersionRow).values(**row, **kept))
