"""What the daemon that runs does between two arrivals: experts taken out, and what retention no longer keeps."""

from dataclasses import replace
from threading import Event

from daemon.compute.progress import Abandoned, Progress
from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadHome, DaemonError
from daemon.interventions import collecting, pruning
from daemon.interventions.requests import Asked, Desk
from daemon.layout import Home
from daemon.rebuild.commands import described, withdraw_from
from daemon.rebuild.replay import Console
from projector.errors import DeviceLost, ProjectorError
from registry.errors import DiskFull, RegistryError
from registry.records import Deed, Status
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


def answer_waiting(home: Home, store: Store, settings: Settings, desk: Desk, stopping: Event) -> None:
    """Does what waits at the desk, one request after another, and answers each. Raises what must end the process, which
    whoever asked hears too, and Abandoned at a stop.
    """
    while desk.waiting:
        asked = desk.waiting.pop(0)
        if not asked.wanted:
            continue
        try:
            lines = _done(home, store, settings, asked, stopping)
        except (DaemonError, ProjectorError) as error:
            asked.failed(error)
        except (OSError, DiskFull) as error:
            if isinstance(error, OSError) and not durable.is_full(error):
                desk.waiting.insert(0, asked)  # where it passes, it is done then
                raise
            asked.failed(BadHome(f"the disk is full: {error}", "make room, then ask again: it goes on where it was"))
        except (DeviceLost, RegistryError) as error:  # only a new process helps
            asked.failed(error)
            raise
        else:
            desk.tell(asked, lines)


def _done(home: Home, store: Store, settings: Settings, asked: Asked, stopping: Event) -> list[str]:
    """What was done, in lines of words."""

    def goes_on() -> None:
        if stopping.is_set():
            raise Abandoned

    if asked.request.deed is Deed.COLLECT:
        return collecting.remove(home, store, settings.retention, goes_on)
    if asked.request.prune:
        return pruning.remove(home, store, asked.request.prune, asked.request.intervention, goes_on)
    return _withdraw(home, store, settings, asked, stopping)


def _withdraw(home: Home, store: Store, settings: Settings, asked: Asked, stopping: Event) -> list[str]:
    request = asked.request
    gone = [expert for number in request.experts if (expert := store.expert(number))]
    if request.version is not None:
        gone = store.lineage(request.version)  # also what was merged since it was asked for
        request = replace(request, version=None, experts=tuple(expert.id for expert in gone))
    if not gone or len(gone) != len(request.experts) or any(expert.status is not Status.MERGED for expert in gone):
        raise BadHome("one of these experts is in the merge no more", "see `mainstem log`, then ask again")
    told = _Telling(asked, stopping)
    plan = withdraw_from(home, store, settings, gone, told, request.intervention, replay=request.replay)
    return described(plan)
