"""`mainstem reload`, or SIGHUP: the settings are read again, and what a running daemon can change of them is in force
from the next expert on.

A terminal that closes sends the same signal, to what was started in it. Then there is nobody left to read the log, and
the process stops as it would by SIGTERM; one that logs elsewhere (a service, nohup) goes on.
"""

import _thread
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any

import structlog
from pydantic import SecretStr

from daemon.config import Settings, is_live
from daemon.errors import BadConfig
from daemon.home.named_heads import check_heads
from daemon.home.supervision import Supervision
from daemon.metrics import Metrics

if TYPE_CHECKING:
    from daemon.interventions.requests import Asked

Read = Callable[[], Settings]
Adopt = Callable[[Settings], None]
Difference = tuple[str, Any, Any]
Told = Callable[[str | None], None]


class Reloading:
    """Reads the settings again when it was asked to."""

    def __init__(self, read: Read, metrics: Metrics, told: Told = lambda _: None) -> None:
        """`read`: from where they came at the start: the file, the environment and the flags. Raises BadConfig. `told`
        hears why they could not be read, or None where they could."""
        self._read = read
        self._metrics = metrics
        self._told = told
        self._log = structlog.get_logger()
        self.asked = False  # set by a signal handler, which had better take no lock
        self._asking: list[Asked] = []
        metrics.reloaded(True)

    def ask(self, asked: "Asked") -> None:
        """They are to be read again, and whoever asks is told what became of it. From any thread."""
        self._asking.append(asked)
        self.asked = True

    def settings(self, now: Settings, heads: Sequence[str], adopt: Adopt) -> Settings:
        """The settings in force from here on: `now`, or what was made of it and handed to `adopt`.

        heads: the home's. adopt: puts settings into force, wholly or, with a BadConfig, not at all. What is wrong is
        logged, and then all stays as it is; whoever asked hears the same.
        """
        self.asked = False
        asking, self._asking = self._asking, []
        try:
            wanted = self._read()
            missing = check_heads(wanted, heads)
            new = taken_up(now, wanted)
            before = self._log.bind()  # by the level so far
            adopt(new)
        except BadConfig as error:
            self._metrics.reloaded(False)
            self._told(str(error))
            self._log.error("the settings cannot be read again: those in force stay", error=str(error), hint=error.hint)
            for one in asking:
                one.failed(error)
            return now
        self._metrics.reloaded(True)
        self._told(None)
        log = before if _verbosity(now) < _verbosity(new) else self._log  # who asks for less is answered all the same
        changed, fixed = differences(now, new), differences(new, wanted)
        for name, before, after in changed:
            log.info("a setting was changed", setting=name, before=before, now=after)
        for name, in_force, configured in fixed:
            log.warning("a setting needs a restart", setting=name, in_force=in_force, configured=configured)
        log.info("the settings were read again", changed=len(changed), need_a_restart=len(fixed))
        if missing:
            log.warning(missing[0], hint=missing[1])
        for one in asking:
            one.done([*_told(changed, fixed), *([f"{missing[0]} ({missing[1]})"] if missing else [])])
        return new


def _told(changed: Sequence[Difference], fixed: Sequence[Difference]) -> list[str]:
    """What was taken up and what was not, in lines of words."""
    taken = [f"taken up: {name} is {_worded(now)}, and was {_worded(before)}" for name, before, now in changed]
    left = [f"needs a restart: {name} is {_worded(now)}, and is to be {_worded(wanted)}" for name, now, wanted in fixed]
    return [*taken, *left] or ["the settings were read again: nothing has changed"]


def _worded(value: Any) -> str:
    return "not set" if value is None else str(value)


def _verbosity(settings: Settings) -> int:
    """The number of the least level that is logged."""
    return logging.getLevelNamesMapping()[settings.log.level.upper()]


def taken_up(now: Settings, wanted: Settings) -> Settings:
    """The settings in force, with those from `wanted` that a running daemon can change."""
    sections = {
        table: section.model_copy(
            update={
                key: getattr(getattr(wanted, table), key)
                for key in type(section).model_fields
                if is_live(f"{table}.{key}")
            }
        )
        for table, section in now.sections().items()
    }
    return now.model_copy(update={**sections, "webhooks": wanted.webhooks})


def differences(one: Settings, other: Settings) -> list[Difference]:
    """(name, value in the one, value in the other) of every setting in which they differ, as they may be shown."""
    shown, others = one.flat(), other.flat()
    before, after = _values(one), _values(other)
    names = dict.fromkeys([*before, *after])
    return [(name, shown.get(name), others.get(name)) for name in names if before.get(name) != after.get(name)]


def _values(settings: Settings) -> dict[str, Any]:
    """As `flat`, with what a secret really is: only to be compared."""
    secrets = {
        f"{table}.{key}": value
        for table, section in settings.sections().items()
        for key, value in section
        if isinstance(value, SecretStr | dict)  # one that may have secrets in it
    }
    secrets |= {f"webhooks.{n}.secret": webhook.secret for n, webhook in enumerate(settings.webhooks)}
    return settings.flat() | secrets


def wake(*events: Event) -> None:
    """Sets these from a signal handler. Whoever was interrupted may hold an event's lock, so another thread does it."""

    def set_all() -> None:
        for event in events:
            event.set()

    _thread.start_new_thread(set_all, ())  # not Thread.start, which takes locks of its own


class Stop(Event):
    """An event that a signal handler may set: `ask`. It is set at once for whoever looks, soon for whoever waits.

    Who looks shows that he goes on.
    """

    def __init__(self, supervision: Supervision) -> None:
        super().__init__()
        self._supervision = supervision
        self._asked = False

    def ask(self) -> None:
        self._asked = True
        self._supervision.stops()
        wake(self)

    def is_set(self) -> bool:
        self._supervision.beat()
        return self._asked or super().is_set()


@contextmanager
def hearing(reload: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    """While it lasts, SIGHUP calls `reload`, or `stop` where the terminal that the log went to is gone."""
    terminal = sys.stderr.isatty()

    def hear(_: int, __: FrameType | None) -> None:
        if terminal and not sys.stderr.isatty():
            stop()
        else:
            reload()

    before = signal.signal(signal.SIGHUP, hear)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
