"""What a home stands on, against its limits: disk, memory, retention; and the process that merges."""

import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from daemon.arrivals.receiving import RESERVE_BYTES
from daemon.config import Settings
from daemon.home.condition import Condition
from daemon.layout import Home
from daemon.release import software_version
from projector.text import duration, size
from registry.reader import Reader
from registry.records import Head

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Fact:
    """A figure beside its limit: `share` of it is used, in [0, 1], where that can be said."""

    name: str
    text: str
    share: float | None = None


def facts(
    home: Home, reader: Reader, heads: Sequence[Head], now: Condition, settings: Callable[[], Settings] | None
) -> Sequence[Fact]:
    """What the page says of the ground."""
    found = []
    with suppress(OSError):
        disk = shutil.disk_usage(home.root)
        least = f"merging waits below {size(RESERVE_BYTES)}"
        used = 1 - disk.free / disk.total if disk.total else None
        found.append(Fact("disk", f"{size(disk.free)} free of {size(disk.total)}; {least}", used))
    kept = [reader.kept(head.name) for head in heads]
    number, nbytes = max((count for count, _ in kept), default=0), sum(n for _, n in kept)
    limit = settings().retention.versions if settings else None
    more = f"; retention keeps {limit}, the base and what is live" if limit else ""
    found.append(Fact("versions", f"{number} of a head on the disk, {size(nbytes)} in all{more}"))
    daemon = now.daemon
    if daemon:
        resident = _resident(daemon.pid)
        budget = daemon.memory_budget
        if resident is not None:
            rest = f"; tensors in hand may take {size(budget)}" if budget else ""
            found.append(Fact("memory", f"{size(resident)} resident{rest}"))
        elif budget:
            found.append(Fact("memory", f"tensors in hand may take {size(budget)}"))
        if daemon.device:
            found.append(Fact("device", daemon.device))
        since = datetime.fromisoformat(daemon.since)
        found.append(Fact("up", f"for {duration((datetime.now(UTC) - since).total_seconds())}"))
    found.append(Fact("mainstem", software_version()))
    return found


def _resident(pid: int) -> int | None:
    """The bytes of memory that the daemon holds; None where that process is not to be seen from here."""
    try:
        if not re.search(rb"mainstem|daemon", (PROC / str(pid) / "cmdline").read_bytes()):  # in a container of its own
            return None
        status = (PROC / str(pid) / "status").read_text()
    except OSError:
        return None
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:")]
    return int(found[0]) * 1024 if found else None
