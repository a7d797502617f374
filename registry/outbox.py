"""The outbox: what is to be told to others, written in the transaction of what happened itself.

Whatever is committed is told, at least once and in order, and nothing is told that was not. The statements work on a
connection whose transaction the store has begun.
"""

from collections.abc import Sequence
from datetime import datetime
from uuid import uuid4

from sqlalchemy import ColumnElement, Connection, delete, insert, select, update

from registry.records import (
    Deed,
    Delivery,
    Endpoint,
    Event,
    Expert,
    Happening,
    NewEndpoint,
    NewExpert,
    NewIntervention,
    NewVersion,
    Outcome,
    Status,
)
from registry.statements import columns, fetch, is_dead
from registry.tables import DeliveryRow, EndpointRow

MOST_ROWS = 1000  # of an endpoint: the oldest go for later ones, whatever became of them
TURNS = {Deed.ROLLBACK: Event.ROLLED_BACK, Deed.PROMOTE: Event.PROMOTED}


def of_version(version: NewVersion, expert: Expert | None = None, change: NewIntervention | None = None) -> Happening:
    """That a version was committed: with the expert that it folds, or after what a person did."""
    data = {
        "head": version.head,
        "version": version.number,
        "expert": expert.name if expert else None,
        "expert_id": expert.id if expert else None,
        "flags": list(expert.flags) if expert else [],
        "reason": version.held,
        "manifest_sha256": version.manifest_sha256,
    }
    if change:
        data |= {"deed": change.deed, "who": change.who, "why": change.why, "without": list(change.experts)}
    return Happening(Event.HELD if version.held else Event.PUBLISHED, data)


def of_expert(expert: NewExpert, expert_id: int) -> list[Happening]:
    """That an expert was refused; nothing of any other."""
    if expert.status is not Status.QUARANTINED:
        return []
    data = {"expert": expert.name, "expert_id": expert_id, "reason": expert.reason}
    data |= {"detail": expert.detail, "hint": expert.hint, "sha256": expert.sha256}
    return [Happening(Event.REFUSED if expert.verdict is None else Event.REJECTED, data)]


def of_turn(turned: NewIntervention) -> list[Happening]:
    """That a person made another version live."""
    data = {"head": turned.head, "version": turned.version, "previous": turned.previous}
    data |= {"who": turned.who, "why": turned.why}
    return [Happening(TURNS[turned.deed], data)]


def message() -> str:
    """A name for an event: it has the same one in all its deliveries, by which a receiver tells that it had it."""
    return f"msg_{uuid4().hex}"


def announce(connection: Connection, happenings: Sequence[Happening], now: datetime) -> None:
    """A delivery for each endpoint that hears of such an event. The oldest of an endpoint that has too many go."""
    if not happenings:
        return
    state = {"at": now, "outcome": Outcome.PENDING, "attempts": 0}
    events = [{"message": message(), **columns(Happening, one), **state} for one in happenings]
    for endpoint in fetch(connection, Endpoint, select(EndpointRow).order_by(EndpointRow.id)):
        if rows := [{"endpoint": endpoint.id, **one} for one in events if one["event"] in endpoint.events]:
            connection.execute(insert(DeliveryRow), rows)
            _bound(connection, endpoint.id)


def _bound(connection: Connection, endpoint: int) -> None:
    its = DeliveryRow.endpoint == endpoint
    last = select(DeliveryRow.id).where(its).order_by(DeliveryRow.id.desc()).limit(1).offset(MOST_ROWS)
    old = delete(DeliveryRow).where(its, DeliveryRow.id <= last.scalar_subquery())
    gone = connection.scalars(old.returning(DeliveryRow.outcome)).all()
    if lost := sum(outcome in (Outcome.PENDING, Outcome.DEAD) for outcome in gone):
        row = update(EndpointRow).where(EndpointRow.id == endpoint)
        connection.execute(row.values(dropped=EndpointRow.dropped + lost))


def follow(connection: Connection, wanted: Sequence[NewEndpoint], now: datetime) -> list[Endpoint]:
    """From here on these are told, and nobody else: what others were still to be told goes."""
    there = {(one.kind, one.target): one for one in fetch(connection, Endpoint, select(EndpointRow))}
    for endpoint in wanted:
        known = there.pop((endpoint.kind, endpoint.target), None)
        if known is None:
            new = {**columns(NewEndpoint, endpoint), "since": now, "dropped": 0}
            connection.execute(insert(EndpointRow).values(**new))
        elif known.events != endpoint.events:
            row = update(EndpointRow).where(EndpointRow.id == known.id)
            connection.execute(row.values(events=endpoint.events))
    for gone in there.values():
        connection.execute(delete(DeliveryRow).where(DeliveryRow.endpoint == gone.id))
        connection.execute(delete(EndpointRow).where(EndpointRow.id == gone.id))
    return fetch(connection, Endpoint, select(EndpointRow).order_by(EndpointRow.id))


def note(connection: Connection, deliveries: Sequence[Delivery]) -> None:
    """Keeps what became of these; nothing of one that is there no more."""
    for one in deliveries:
        kept = {name: getattr(one, name) for name in ("outcome", "attempts", "next_at", "tried_at", "answer")}
        connection.execute(update(DeliveryRow).where(DeliveryRow.id == one.id).values(**kept))


def repeat(connection: Connection, ids: Sequence[int] | None) -> int:
    """These are to be delivered once more, or, of None, all that are dead; how many. What is pending is due at once."""
    which: ColumnElement[bool] = is_dead if ids is None else DeliveryRow.id.in_(ids)
    again = {"outcome": Outcome.PENDING, "attempts": 0, "next_at": None}
    return connection.execute(update(DeliveryRow).where(which).values(**again)).rowcount
