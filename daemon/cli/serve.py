"""`mainstem serve`: read-only HTTP over an existing home, without torch."""

import signal
from typing import Annotated, Any

import typer

from daemon.cli.common import HomeOption, open_reader, settings_of


def command(
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on (http.host).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one (http.port).")] = None,
) -> None:
    """Serve the versions of an existing home over HTTP; reads only, needs no daemon."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server hears it

    from daemon.http import Hosts, HttpServer, base_url, create_app
    from daemon.metrics import Metrics

    where, reader = open_reader(home)
    flags: dict[str, Any] = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    settings = settings_of(where, {"http": flags} if flags else None)
    with reader:
        metrics = Metrics()
        metrics.follow(reader)
        http = settings.http
        app = create_app(
            where, reader, metrics.registry, lambda: None, hosts=Hosts(http.host, http.allowed_hosts), beside=True
        )
        server = HttpServer(app, http.host, http.port, http.stall_seconds)
        bound, number = server.start()
        typer.echo(f"serving {where.root} on {base_url(bound, number)}")
        server.wait_for_signal(_nothing_to_reload)


def _nothing_to_reload() -> None:
    from daemon.logs import standard_error

    typer.echo("nothing was read again: http.host and http.port need a restart", file=standard_error())
