"""Told once that nothing goes on, and once that it does again; never of a daemon that has nothing to do."""

from collections.abc import Sequence
from typing import Any

from daemon.home.condition import WAITING, Condition
from daemon.home.health import Trouble
from daemon.home.presence import Doing
from daemon.outbox.stalling import Stalling
from registry.records import Event

FULL = Trouble("disk_full", "the disk is full", "make room")
LOST = Trouble("no_inbox", "the inbox is gone", "make it again")


def condition(doing: str = Doing.WATCHING, text: str = "idle", **more: Any) -> Condition:
    values = {"since": None, "expert": None, "share": None, "left_seconds": None, "waiting": (), "troubles": ()}
    return Condition(doing, text, **{**values, "daemon": None, **more})


IDLE = condition()
WAITS = condition(WAITING, FULL.text, troubles=(LOST, FULL))
WAITS_OTHERWISE = condition(WAITING, LOST.text, troubles=(LOST, FULL))


def merging(expert: str, share: float) -> Condition:
    return condition(Doing.MERGING, f"merging {expert}", expert=expert, share=share)


def told(steps: Sequence[tuple[float, Condition]]) -> list[object]:
    """(time, event, reason) of all that is told, of one that is stalled after 100 seconds."""
    stalling = Stalling()
    found = [(now, stalling.look(what, now, 100.0)) for now, what in steps]
    return [(now, one.event, one.data["reason"]) for now, one in found if one]


def test_a_wait_is_told_once_and_its_end_once() -> None:
    steps = [(now, WAITS) for now in range(0, 300, 10)]
    assert told([*steps, (300, IDLE), (310, IDLE)]) == [
        (100, Event.STALLED, "disk_full"),
        (300, Event.RECOVERED, "disk_full"),
    ]


def test_a_short_wait_is_not_told_nor_a_daemon_without_work() -> None:
    assert not told(
        [(0, WAITS), (90, IDLE), (100, WAITS), (190, IDLE), *((now, IDLE) for now in range(200, 9000, 100))]
    )


def test_an_expert_that_gets_no_further_is_told() -> None:
    slow = [(now, merging("a", now / 1000)) for now in range(0, 500, 90)]
    hangs = [(now, merging("a", 0.5)) for now in range(500, 700, 50)]
    assert told([*slow, *hangs, (700, merging("a", 0.6)), (900, merging("a", 0.6))]) == [
        (600, Event.STALLED, "no_progress"),
        (700, Event.RECOVERED, "no_progress"),
        (900, Event.STALLED, "no_progress"),
    ]


def test_another_trouble_is_no_recovery_and_merging_again_is_one() -> None:
    steps = [(0, WAITS), (100, WAITS), (110, WAITS_OTHERWISE), (400, merging("a", 0.1)), (410, merging("a", 0.2))]
    assert told(steps) == [(100, Event.STALLED, "disk_full"), (410, Event.RECOVERED, "disk_full")]


def test_an_evaluator_has_its_own_time() -> None:
    scored = condition(Doing.EVALUATING, "evaluating a", expert="a", share=0.9)
    assert not told([(now, scored) for now in range(0, 9000, 100)])
