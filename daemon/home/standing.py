"""Where a head stands whose newest version is not the live one, and where an expert stands that was decided: why, and
what changes that. The command line, the page and the API say it alike.
"""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from daemon.errors import Reason
from daemon.layout import Home
from daemon.manifest import Manifest
from daemon.notation import called
from registry.reader import Reader
from registry.records import LEARNED, Expert, Head, Status


@dataclass(frozen=True, slots=True)
class Held:
    """The newest version of a head, which is not live. frozen: nor will the next be by itself. command: makes it so."""

    version: int
    why: str
    frozen: bool
    command: str


def held(home: Home, reader: Reader, head: Head) -> Held | None:
    """Why the newest version of a head is not live; None where it is. All reasons, where it lacks the coefficients of
    the live one, too: what makes it live makes another model so."""
    if head.live == head.newest and head.frozen in (None, LEARNED):
        return None
    newest = reader.version(head.name, head.newest)
    reasons = [head.frozen, newest.held if newest else None]
    if head.frozen == LEARNED:
        reasons.reverse()
    why = next(filter(None, reasons), "another version is live")
    if unlearned(home, head, head.newest):
        learns = f"`mainstem rebuild --head {head.name} --adamerging COMMAND` learns them again"
        why = f"{_with_learned(why)}: promoted, it is the plain sum; {learns}"
    return Held(head.newest, why, head.frozen is not None, f"mainstem promote {called(head.name, head.newest)}")


def unlearned(home: Home, head: Head, number: int) -> bool:
    """True where the head's live version has coefficients that were learned, and that one has none."""
    return number != head.live and learned(home, head, head.live) and not learned(home, head, number)


def learned(home: Home, head: Head, number: int) -> bool:
    """True for a version with coefficients that were learned; also False where its manifest cannot be read."""
    try:
        return bool(Manifest.read(home.manifest(head.name, number).read_bytes()).content.get("adamerging"))
    except (OSError, ValueError):
        return False


def _with_learned(why: str) -> str:
    return why if LEARNED in why else f"{why}; and {LEARNED}"


def withdrawn_since(reader: Reader, numbers: Iterable[int]) -> dict[int, list[Expert]]:
    """By the number of a version, the experts that it has and that were taken out of the merge since, oldest first."""
    found: dict[int, list[Expert]] = {number: [] for number in sorted(set(numbers))}
    order = list(found)
    for expert in reversed(reader.experts(Status.WITHDRAWN, limit=-1)):
        came, went = expert.version or 0, expert.withdrawn_in or 0
        for number in order[bisect_left(order, came) : bisect_left(order, went)]:
            found[number].append(expert)
    return found


def back(number: int, *, blocked: bool) -> list[str]:
    """The commands, in their order, that put a refused expert back into the inbox; what is blocked would not be taken.

    >>> back(5, blocked=True)
    ['mainstem unblock 5', 'mainstem quarantine retry 5']
    """
    return [*([f"mainstem unblock {number}"] if blocked else ()), f"mainstem quarantine retry {number}"]


class Outcome(StrEnum):
    """What became of an expert, for whoever sent it."""

    LIVE = "live"  # merged, and in what every head serves
    HELD = "held"  # merged, but not in what some head serves
    REJECTED = "rejected"  # by the gate
    REFUSED = "refused"
    DUPLICATE = "duplicate"
    WITHDRAWN = "withdrawn"


def outcome(reader: Reader, expert: Expert) -> tuple[Outcome, dict[str, Held]]:
    """What became of it, and the versions with it that are not live, by head."""
    if expert.status is Status.QUARANTINED:
        return (Outcome.REJECTED if expert.reason == Reason.SCORES else Outcome.REFUSED), {}
    if expert.status is not Status.MERGED or expert.version is None:
        return (Outcome.DUPLICATE if expert.status is Status.DUPLICATE else Outcome.WITHDRAWN), {}
    behind = [head for head in reader.heads() if head.live < expert.version]
    stays = {head.name: _held(reader, head, expert.version) for head in behind}
    return (Outcome.HELD if stays else Outcome.LIVE), stays


def _held(reader: Reader, head: Head, number: int) -> Held:
    version = reader.version(head.name, number)
    why = (version and version.held) or head.frozen or "another version is live"
    why = _with_learned(why) if head.frozen == LEARNED else why
    return Held(number, why, head.frozen is not None, f"mainstem promote {called(head.name, head.newest)}")
