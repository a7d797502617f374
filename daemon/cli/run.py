"""`mainstem run`: the daemon."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from daemon.cli.common import HomeArgument, HomeOption, find_home, logged, named_home, settings_of
from daemon.layout import Home
from projector.text import shown

if TYPE_CHECKING:
    from daemon.arrivals.inbox import Drop


def command(
    at: HomeArgument = None,
    home: HomeOption = None,
    once: Annotated[bool, typer.Option("--once", help="Drain the inbox, then exit.")] = False,
    no_http: Annotated[bool, typer.Option("--no-http", help="Do not serve HTTP.")] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on (http.host).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one (http.port).")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N (compute.device).")] = None,
) -> None:
    """Watch the inbox, merge, publish and serve, until SIGTERM or Ctrl-C."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the service hears it: the settings have not been read yet

    with logged(Home(named_home(at, home) or Path.cwd()).config):
        start(find_home(at, home), once, no_http, host, port, device)


def start(
    where: Home,
    once: bool,
    no_http: bool,
    host: str | None = None,
    port: int | None = None,
    device: str | None = None,
) -> None:
    """Runs the daemon over that home in this process, until it ends."""
    import structlog

    from daemon.config import strangers
    from daemon.logs import configure
    from daemon.service import Service

    flags: dict[str, dict[str, Any]] = {"http": {"host": host, "port": port}, "compute": {"device": device}}
    given = {table: {k: v for k, v in keys.items() if v is not None} for table, keys in flags.items()}
    read = partial(settings_of, where, {table: keys for table, keys in given.items() if keys})
    settings, needed = read(), where.config.exists()
    configure(settings.log)
    if unknown := strangers():
        structlog.get_logger().warning("no setting is called so", environment=unknown)
    again = partial(read, needed=needed)  # a file that is being replaced is no wish for the defaults
    service = Service(where, settings, _bar if sys.stderr.isatty() else None, again)
    service.run(once=once, http=settings.http.enabled and not no_http)


@contextmanager
def _bar(drop: "Drop") -> Iterator[Callable[[float], None]]:
    """A progress bar per expert, for a terminal."""
    from daemon.logs import standard_error

    columns = (
        TextColumn("{task.description}", markup=False),  # a drop may be called [red]
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(file=standard_error()), transient=True) as progress:
        task = progress.add_task(shown(drop.name), total=1.0)
        yield lambda share: progress.update(task, completed=share)
