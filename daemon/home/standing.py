"""Where a head stands whose newest version is not the live one: why, and what ends that. A module of its own, for the
command line and the page say it alike.
"""

from dataclasses import dataclass

from daemon.notation import called
from registry.reader import Reader
from registry.records import Head


@dataclass(frozen=True, slots=True)
class Held:
    """The newest version of a head, which is not live. frozen: nor will the next be by itself. command: makes it so."""

    version: int
    why: str
    frozen: bool
    command: str


def held(reader: Reader, head: Head) -> Held | None:
    """Why the newest version of a head is not live; None where it is."""
    if head.live == head.newest and head.frozen is None:
        return None
    newest = reader.version(head.name, head.newest)
    why = head.frozen or (newest and newest.held) or "another version is live"
    return Held(head.newest, why, head.frozen is not None, f"mainstem promote {called(head.name, head.newest)}")
