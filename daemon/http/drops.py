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
from registry.reader import Reader
from registry.records import Expert

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
            return {"name": name, "state": "uploading", "why": "it is being sent", "files": list(map(asdict, files))}
        try:
            found = entry(self._home, self._reader, name)
        except OSError:
            return None
        if found is None:
            return None
        word, one = found
        since = one.since.isoformat(timespec="seconds") if one.since else None
        return {"name": name, "state": word, "why": one.why, "since": since}

    def arrivals(self, words: str) -> list[Expert]:
        """What arrived with that sha256, or else the newest that was dropped under that name. Problem 404 or 409."""
        if found := arrivals(self._reader, words.lower()):
            return found
        if named := self._reader.dropped_as(words):
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
