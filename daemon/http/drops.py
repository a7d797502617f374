"""What became of a drop, by the name under which it was dropped or sent, or by its sha256: coming, waiting, or decided.

A name is first that of what is there now, which may be another than what was dropped under it before.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict

from daemon.arrivals.receiving import NAME, Stored
from daemon.home.condition import entry
from daemon.home.standing import outcome
from daemon.http.answers import Problem
from daemon.http.finding import arrivals
from daemon.http.rows import Row
from daemon.layout import Home
from projector.text import shown
from registry.reader import Reader
from registry.records import Expert

DIGITS = 64  # of a sha256

Sent = Callable[[str], Sequence[Stored] | None]
"""The files that came of an upload under that name; None where there is none."""


class Drops:
    """The drops of one home."""

    def __init__(self, home: Home, reader: Reader, sent: Sent) -> None:
        self._home = home
        self._reader = reader
        self._sent = sent

    def undecided(self, name: str) -> Row | None:
        """What is going on with the drop of that name, while nothing is decided."""
        if not NAME.fullmatch(name):  # the others cannot be asked for: a path may not lead elsewhere
            return None
        if (files := self._sent(name)) is not None:
            sent = {"name": name, "state": "uploading", "why": "it is being sent", "before": self._before(name)}
            return {**sent, "files": list(map(asdict, files))}
        try:
            found = entry(self._home, self._reader, name)
        except OSError:
            return None
        if found is None:
            return None
        word, one = found
        return {**one.described(), "state": word, "before": self._before(name)}

    def _before(self, name: str) -> int | None:
        """The newest that was dropped under that name before, and is not this one."""
        earlier = self._reader.dropped_as(shown(name))
        return earlier.id if earlier else None

    def arrivals(self, words: str) -> list[Expert]:
        """The newest that was dropped under that name, or else what arrived with that sha256: a name such as 2024 may
        also be how one begins. Of a whole sha256 it is the other way round. Problem 404 or 409.
        """
        named = self._reader.dropped_as(shown(words))
        if named and len(words) < DIGITS:
            return [named]
        if found := arrivals(self._reader, words.lower()):
            return found
        if named:
            return [named]
        raise Problem(404, "unknown_expert", "no expert has that sha256 or name", "GET /v1/experts lists the experts")

    def decided(self, expert: Expert) -> Row:
        """What became of it."""
        word, stays = outcome(self._reader, expert)
        return {
            "state": "decided",
            "outcome": word,
            "held": [{"head": name, **asdict(one)} for name, one in stays.items()],
        }
