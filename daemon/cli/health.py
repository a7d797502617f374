"""`mainstem health`: an exit status for whoever probes."""

import json
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, open_reader, print_json
from daemon.errors import BadHome

if TYPE_CHECKING:
    from daemon.home.condition import Condition

LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # where a server that listens everywhere is asked
MOST_BYTES = 1 << 20


def command(
    at: HomeArgument = None,
    home: HomeOption = None,
    url: Annotated[
        str | None, typer.Option(help="Ask the server there, as `mainstem serve`, and look at no home.")
    ] = None,
    live: Annotated[
        bool, typer.Option("--live", help="Only whether it goes on; to wait for space is no fault.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a server may take to answer.", min=0.1)] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Say in one line whether the daemon is well; exit status 1 where it is not."""
    why = _served(url, live, timeout) if url else _of_home(at, home, live, timeout)
    if as_json:
        print_json({"healthy": why is None, "live": live, "why": why})
    else:
        typer.echo("healthy" if why is None else f"not healthy: {why}")
    if why is not None:
        raise typer.Exit(1)


def _of_home(at: Any, home: Any, live: bool, timeout: float) -> str | None:
    """What is wrong with the daemon over a home; None where nothing is."""
    from daemon.home.condition import NOBODY, condition
    from daemon.home.presence import running
    from registry.errors import RegistryError

    try:
        where, reader = open_reader(at, home)
    except (BadHome, RegistryError) as error:
        return f"{error} ({error.hint})"
    with reader:
        try:
            daemon = running(where)
        except OSError as error:
            return f"its lock cannot be read: {error.strerror}"
        if daemon is None:
            return f"{NOBODY}: start `mainstem run`"
        if daemon.url:
            return _served(daemon.url, live, timeout)
        return None if live else _unready(condition(where, reader))


def _unready(found: "Condition") -> str | None:
    from daemon.home.presence import Doing

    if found.troubles:
        return "; ".join(f"{one.text} ({one.hint})" for one in found.troubles)
    return found.text if found.doing in (Doing.RECOVERING, Doing.BUSY) else None


def _served(url: str, live: bool, timeout: float) -> str | None:
    """What the server at that address says is wrong; None where it answers and nothing is."""
    import http.client

    parts = urlsplit(url if "://" in url else f"http://{url}")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    host, address = parts.hostname or "", f"{parts.path.rstrip('/')}/{'livez' if live else 'readyz'}"
    try:
        connection = kind(LOOPBACK.get(host, host), parts.port or kind.default_port, timeout=timeout)
    except (ValueError, http.client.HTTPException) as error:
        raise typer.BadParameter(f"{url} is no address: {error}", param_hint="--url") from None
    try:
        connection.request("GET", address)
        answer = connection.getresponse()
        status, body = answer.status, answer.read(MOST_BYTES)
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{url} does not answer: {error}"
    finally:
        connection.close()
    return None if status == 200 else _told(status, body)


def _told(status: int, body: bytes) -> str:
    try:
        said = json.loads(body)
        return f"{said['error']} ({said['hint']})"
    except (ValueError, TypeError, KeyError):
        return f"the server answers {status}"
