"""`mainstem drain`: the queue is finished, then the daemon stops."""

import os
import time
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.asking import ReasonOption, intervene
from daemon.cli.common import HomeArgument, HomeOption, find_home, logged, one_home
from daemon.errors import BadHome
from daemon.layout import Home
from registry.records import Deed

if TYPE_CHECKING:
    from daemon.home.presence import Running

LOOK_SECONDS = 0.2


def command(
    at: HomeArgument = None,
    reason: ReasonOption = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return once the daemon has stopped.")] = True,
    home: HomeOption = None,
) -> None:
    """Finish what is in the inbox now, and stop. What comes meanwhile stays there. Where no daemon runs, this command
    merges what waits.
    """
    from daemon.disk import durable

    where = find_home(at, home)
    alone = not durable.is_locked(where.lock)
    intervene(Deed.DRAIN, one_home(at, home), reason, False)
    if alone:
        from daemon.cli import run

        with logged(where.config):
            run.start(where, once=True, no_http=True)
    elif wait:
        _wait(where)
    if alone or wait:
        typer.echo(f"stopped: {_left(where)}")


def _wait(home: Home) -> None:
    """Until the daemon has stopped, telling what it merges. Raises BadHome where it ended otherwise."""
    from daemon.home.orders import Kind, order
    from daemon.home.presence import Doing, running

    said, first = None, running(home)
    while (daemon := running(home)) and first and daemon.pid == first.pid:  # a supervisor may start another
        now = order(home)
        doing = _doing(daemon)
        if doing and doing != said:
            said = doing
            typer.echo(said)
        if now is None and daemon.doing in (Doing.WATCHING, Doing.MERGING):
            raise BadHome("the drain was called off: the daemon goes on", "`mainstem log --interventions` says by whom")
        if now and now.kind is not Kind.DRAIN:
            raise BadHome(now.text(), "`mainstem drain` again, or `mainstem resume`")
        time.sleep(LOOK_SECONDS)
    if daemon is None and order(home):
        raise BadHome(
            "the daemon ended before the queue was finished", "its log says why; the next start goes on draining"
        )


def _doing(daemon: "Running") -> str | None:
    """What it merges, what is wrong, or which entry it waits for: one that is not complete may take an hour."""
    if daemon.merging:
        return f"merging {daemon.merging}"
    waits = (f"waits for {name}: {daemon.why_waits(name)}" for name in daemon.waiting)
    return next((str(one["text"]) for one in daemon.troubles), None) or next(waits, None)


def _left(home: Home) -> str:
    """What is still in the inbox, in words."""
    from daemon.arrivals.inbox import TEMPORARY

    left = [name for name in os.listdir(home.inbox) if not TEMPORARY.fullmatch(name)]
    return f"{len(left)} left in the inbox: `mainstem status` says why" if left else "the inbox is empty"
