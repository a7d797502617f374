"""What a page says of the present: in the page itself, and in the events that keep it up to date without a reload."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from daemon.home.condition import DAMAGED, NONE, Condition
from daemon.home.condition import WAITING as HINDERED
from daemon.home.presence import Doing
from registry.records import Head, Status

WAITING = 20  # entries that an event names
TONES = {
    Doing.WATCHING: "good",
    Doing.MERGING: "busy",
    Doing.EVALUATING: "busy",
    DAMAGED: "bad",
    NONE: "bad",
    HINDERED: "bad",
}
PILLS = {
    "disk_full": "waiting for disk",
    "no_inbox": "waiting for the inbox",
    "registry": "waiting for the registry",
}
"""What merging waits for, by the reason of the trouble."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """The pill's words and its tone (good, busy, mild or bad), and the two events as JSON.

    home: what is live and how much there is. key: the same as long as only the progress has changed. A page that shows
    another home or key is out of date.
    """

    pill: str
    tone: str
    condition: str
    home: str
    key: str

    @property
    def events(self) -> Mapping[str, str]:
        """By their names."""
        return {"condition": self.condition, "home": self.home}


def spoken(now: Condition, heads: Sequence[Head], counts: Mapping[Status, int], open_cases: int) -> Spoken:
    """What to say."""
    pill, tone = _pill(now), TONES.get(now.doing, "mild")
    waiting = (now.queue() or [])[:WAITING]
    troubles = [asdict(one) for one in now.troubles]
    key = json.dumps([now.doing, now.expert, [(one["name"], one["why"]) for one in waiting], troubles])
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    condition = {
        "doing": now.doing,
        "text": now.text,
        "pill": pill,
        "tone": tone,
        "since": now.since.isoformat(timespec="seconds") if now.since else None,
        "expert": now.expert,
        "share": now.share,
        "left_seconds": None if now.left_seconds is None else round(now.left_seconds),
        "waiting": waiting,
        "waiting_count": None if now.waiting is None else len(now.waiting),
        "troubles": troubles,
        "key": digest,
    }
    home = {
        "heads": [
            {"name": one.name, "live": one.live, "newest": one.newest, "frozen": one.frozen is not None}
            for one in heads
        ],
        "experts": {str(status): count for status, count in counts.items()},
        "open_cases": open_cases,
    }
    return Spoken(pill, tone, json.dumps(condition), json.dumps(home), digest)


def _pill(now: Condition) -> str:
    if now.doing == Doing.WATCHING:
        return "idle"
    if now.doing == HINDERED:
        return next((PILLS[one.reason] for one in now.troubles if one.reason in PILLS), str(now.doing))
    if now.expert and now.doing not in (DAMAGED, NONE):
        return f"{now.doing} {now.expert}" + (f" {now.share:.0%}" if now.share is not None else "")
    return str(now.doing)
