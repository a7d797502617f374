"""`mainstem serve`: read-only HTTP over an existing home, without torch."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.common import HomeArgument, HomeOption, logged, named_home, open_reader, settings_of
from daemon.layout import Home

if TYPE_CHECKING:
    from registry.reader import Reader


def command(
    at: HomeArgument = None,
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (http.host).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one (http.port).")] = None,
) -> None:
    """Serve the versions of an existing home over HTTP; reads only, needs no daemon."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server hears it

    with logged(Home(named_home(at, home) or Path.cwd()).config):
        where, reader = open_reader(at, home)
        with reader:
            _serve(where, reader, host, port)


def _serve(where: Home, reader: "Reader", host: str | None, port: int | None) -> None:
    from daemon.http import HttpServer, base_url, create_app
    from daemon.metrics import HeadMetrics

    flags: dict[str, Any] = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = settings_of(where, {"http": flags} if flags else None)
    metrics = HeadMetrics()
    metrics.follow(reader)
    reader.timed = metrics.transaction
    http = settings.http
    app = create_app(
        where,
        reader,
        metrics.registry,
        lambda: None,
        beside=True,
        counting=metrics,
        settings=lambda: settings,
    )
    server = HttpServer(app, http.host, http.port, http.stall_seconds)
    bound, number = server.start()
    said = f"serving {where.root} on {base_url(bound, number)}"
    server.wait_for_signal(_nothing_to_reload, listening=lambda: typer.echo(said))


def _nothing_to_reload() -> None:
    from daemon.logs import standard_error

    typer.echo("nothing was read again: http.host and http.port need a restart", file=standard_error())
