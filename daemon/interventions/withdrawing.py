"""Experts taken out by the daemon that runs, between two arrivals."""

from threading import Event

from daemon.compute.progress import Progress
from daemon.config import Settings
from daemon.errors import BadHome
from daemon.interventions.requests import Asked
from daemon.layout import Home
from daemon.rebuild.commands import described, withdraw_from
from daemon.rebuild.replay import Console
from registry.records import Status
from registry.store import Store


class _Telling(Console):
    """Tells whoever asked how far it is."""

    def __init__(self, asked: Asked, stopping: Event) -> None:
        self._asked = asked
        self._stopping = stopping

    def say(self, text: str) -> None:
        self._asked.doing(text)

    def progress(self) -> Progress:
        return Progress(self._stopping, self.show)


def withdraw_for(home: Home, store: Store, settings: Settings, asked: Asked, stopping: Event) -> list[str]:
    """Takes out what was asked for; returns what was done in lines of words. Raises as `withdraw_from`, and Abandoned
    at a stop.
    """
    request = asked.request
    gone = [expert for number in request.experts if (expert := store.expert(number))]
    if len(gone) != len(request.experts) or any(expert.status is not Status.MERGED for expert in gone):
        raise BadHome("one of these experts is in the merge no more", "see `mainstem log`, then ask again")
    told = _Telling(asked, stopping)
    plan = withdraw_from(home, store, settings, gone, told, request.intervention, replay=request.replay)
    return described(plan)
