"""The statements of the store's transactions: each works on a connection whose transaction the store has begun."""

import re
from collections.abc import Collection, Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Text,
    and_,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
    type_coerce,
    union,
    update,
)

from registry.errors import BadRecord, StaleHead
from registry.records import BaseModel, Expert, Flag, Head, NewExpert, NewVersion, Status, Version
from registry.tables import AnyText, ExpertRow, HeadRow, VersionRow

Record = TypeVar("Record", BaseModel, Head, Expert, Version)

# These in the words of the indexes: with bound values in them SQLite would not take the index.
given_name = func.json_extract(ExpertRow.about, literal_column("'$.name'"), type_=AnyText())  # in its expert.json
is_merged = ExpertRow.status == literal_column("'merged'")
is_kept = VersionRow.collected == literal_column("0")
_LAST = "\U0010ffff"  # behind every letter
PROGRAM_HINT = "this is a fault in the program: please report it"


def merged_as(sha256: str) -> Select[Any]:
    """The merged expert with those bytes."""
    return select(ExpertRow).where(ExpertRow.sha256 == sha256, is_merged)


def merged_content(content_sha256: str) -> Select[Any]:
    """The merged expert that does the same to the base, bit for bit, in whatever files."""
    return select(ExpertRow).where(ExpertRow.content_sha256 == content_sha256, is_merged)


def called(words: str) -> ColumnElement[bool]:
    """It has exactly that name, as dropped or in its expert.json, or a sha256 that begins so (4 digits or more)."""
    wanted = or_(ExpertRow.name == words, given_name == words)
    begins = words.lower()
    if 4 <= len(begins) <= 64 and set(begins) <= set("0123456789abcdef"):
        # a range, which an index can answer: what comes after every digest that begins so is "g"
        return or_(wanted, and_(ExpertRow.sha256 >= begins, ExpertRow.sha256 < f"{begins}g"))
    return wanted


def lineage_after(version: int, limit: int | None) -> Select[Any]:
    """The merged experts that came with a later version than that, in the order of merging."""
    query = select(ExpertRow).where(is_merged, ExpertRow.version > version)
    return query.order_by(ExpertRow.version).limit(limit)


def experts_in(number: int, after: int, limit: int | None) -> Select[Any]:
    """The experts that version `number` has, of those that came with a later one than `after`, as they were merged."""
    came = ExpertRow.version > after, ExpertRow.version <= number
    there = or_(ExpertRow.withdrawn_in.is_(None), ExpertRow.withdrawn_in > number)
    return select(ExpertRow).where(*came, there).order_by(ExpertRow.version).limit(limit)


def comes_from(connection: Connection, head: str, number: int, ancestor: int) -> bool:
    """Whether version `ancestor` is `number` itself or one of those it was made from.

    Nearly every version was made from the one before; those that were not are few and have an index of their own. A
    head that was added later begins with one version, made from version 0, in which all experts of that time are: it
    counts as made from every one before it.
    """
    branched = select(VersionRow.number, VersionRow.parent, VersionRow.expert_id)
    branched = branched.where(VersionRow.head == head, text("parent <> number - 1"))
    at: int | None = number
    while at and at >= ancestor:
        branch = connection.execute(
            branched.where(VersionRow.number <= at).order_by(VersionRow.number.desc()).limit(1)
        ).first()
        if branch is None or branch.number <= ancestor or (branch.parent == 0 and branch.expert_id is None):
            return True
        at = branch.parent
    return False


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


def advance(connection: Connection, version: NewVersion) -> None:
    """Moves a head on to its new version. Raises StaleHead unless it stands where that one expects it."""
    at_parent = HeadRow.name == version.head, HeadRow.live == version.parent, HeadRow.newest == version.number - 1
    moved = connection.execute(update(HeadRow).where(*at_parent).values(live=version.number, newest=version.number))
    if moved.rowcount != 1:
        raise StaleHead(
            f"head {version.head} is no longer at version {version.parent}: version {version.number} cannot follow",
            "fold the expert again, onto the version that is live now",
        )


def insert_expert(connection: Connection, expert: NewExpert, version: int | None, now: datetime) -> Expert:
    """A row for an arrival, and what became of it."""
    row = insert(ExpertRow).values(**columns(NewExpert, expert), version=version, finished_at=now, place=None)
    key = connection.execute(row.returning(ExpertRow.id)).scalar_one()  # RETURNING can give an integer for a float
    return fetch(connection, Expert, select(ExpertRow).where(ExpertRow.id == key))[0]


def insert_head(connection: Connection, head: Head) -> None:
    """A row for a head, behind those that are there."""
    position = connection.execute(select(func.count()).select_from(HeadRow)).scalar_one()
    connection.execute(insert(HeadRow).values(position=position, **columns(Head, head)))


def withdraw(connection: Connection, expert_ids: Sequence[int], number: int) -> None:
    """Notes that these merged experts went with version `number`. Raises BadRecord where one of them is not merged."""
    rows = update(ExpertRow).where(ExpertRow.id.in_(expert_ids), ExpertRow.status == Status.MERGED)
    gone = connection.execute(rows.values(status=Status.WITHDRAWN, withdrawn_in=number))
    if gone.rowcount != len(expert_ids):
        raise BadRecord(f"of the experts {list(expert_ids)} only {gone.rowcount} are merged", PROGRAM_HINT)


def insert_versions(
    connection: Connection, versions: Sequence[NewVersion], expert_id: int | None, now: datetime
) -> None:
    """A row for each version; `expert_id` is the expert that they fold, None where they fold none."""
    for version in versions:
        row = columns(NewVersion, version)
        connection.execute(insert(VersionRow).values(**row, expert_id=expert_id, created_at=now, collected=False))
