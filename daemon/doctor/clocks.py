"""What time it is, and what time it was. Retention, ages and the order of events are told by this clock. A module of
its own, as every subject of the doctor is.
"""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

from daemon.doctor.finding import Finding, bad, ok
from registry.reader import Reader

YEAR = 2024  # nobody ran this before
LENIENCE = timedelta(minutes=1)
HINT = "set the clock, and keep it right by NTP (chrony, systemd-timesyncd)"


def check(reader: Reader | None, now: datetime | None = None) -> Iterator[Finding]:
    """now: other than the clock's, for tests."""
    now = now or datetime.now(UTC)
    if now.year < YEAR:
        yield bad("clock", f"it says {now:%Y-%m-%d}", HINT)
        return
    last = _newest(reader) if reader else None
    if last and last > now + LENIENCE:
        text = f"it says {now:%Y-%m-%d %H:%M}, but something happened here at {last:%Y-%m-%d %H:%M} (UTC)"
        yield bad("clock", text, HINT)
        return
    yield ok("clock", f"{now:%Y-%m-%d %H:%M} UTC" + (", later than all that is in the registry" if last else ""))


def _newest(reader: Reader) -> datetime:
    rows = [row for head in reader.heads() for row in reader.versions(head.name, limit=1)]
    times = [row.created_at for row in rows] + [one.finished_at for one in reader.experts(limit=1)]
    times += [one.at for one in reader.interventions(limit=1)]
    return max([reader.base().created_at, *(moment for moment in times if moment)])
