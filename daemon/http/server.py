"""The socket and the thread: uvicorn beside the merge loop, without signal handlers of its own."""

import asyncio
import errno
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import cast

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from daemon.errors import BadConfig, DaemonError, Reason
from daemon.http.connections import Connection, Guard, hung_up, most_connections
from daemon.reloading import hearing, wake
from projector.text import shown

GRACE_SECONDS = 5  # how long downloads may go on once we stop
STALL_SECONDS = 60.0
BACKLOG = 1024  # connections that may wait to be accepted
ACCEPTED_AT_ONCE = 16  # before they are counted
TICK_SECONDS = 0.02  # between looks at whether the server has started


def base_url(host: str, port: int) -> str:
    """The address as it is typed: an IPv6 host goes into brackets."""
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def _advice(error: OSError | UnicodeError) -> str:
    """What to do where the address cannot be listened on."""
    if isinstance(error, socket.gaierror | UnicodeError):
        return (
            "http.host (--host) is an address or a name of this machine, without scheme, port and brackets: 127.0.0.1, "
            "0.0.0.0 for all of IPv4, :: for all"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return "http.host (--host) must be an address of this machine: 127.0.0.1, or 0.0.0.0 for all that it has"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "ports below 1024 are for root: choose another http.port (--port)"
    return (
        "another program, or another mainstem, may be using it: choose another http.port (--port; 0 for any free one)"
    )


class _Server(uvicorn.Server):
    """uvicorn, except that it tells the answers under way when it stops, and that after the grace it drops the
    connections it has waited for in vain.
    """

    def __init__(self, config: uvicorn.Config, stopping: asyncio.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._stopping.set()
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(TICK_SECONDS)  # an aborted transport closes its socket in a later turn of the loop


class HttpServer:
    """Serves an application in a daemon thread. Starts once. Every request has two events: `state.stopping` is set when
    the server begins to stop, `state.hung_up` when the client has closed its side of the connection. It may listen yet,
    or be gone, so it is to be answered; who only waits for something should end at either. `state.waiters` is how many
    may wait at a time without keeping others out.

    Use it beside a loop (`start`, later `stop`), as a context manager, or alone:
    `server.start()` and then `server.wait_for_signal()`.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, stall_seconds: float = STALL_SECONDS) -> None:
        """`port` 0 asks the system for a free one. `stall_seconds`: over how long a client's pace is measured."""
        self.host = host
        self.port = port
        stopping = asyncio.Event()
        guard = Guard(stall_seconds, most_connections())
        self._server = _Server(
            uvicorn.Config(
                _told(app, stopping, guard.most // 2),
                lifespan="off",
                loop="asyncio",
                http=cast(type[asyncio.Protocol], partial(Connection, guard)),  # anything that makes one will do
                backlog=ACCEPTED_AT_ONCE,
                ws="none",
                access_log=False,
                log_config=None,  # what it has to say goes through the daemon's own logging
                log_level=logging.WARNING,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=GRACE_SECONDS,
            ),
            stopping,
        )
        self._thread: threading.Thread | None = None

    def start(self) -> tuple[str, int]:
        """Listens, and returns the host and port that were bound. BadConfig when the address cannot be used."""
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            listener = socket.create_server((self.host, self.port), family=family)
        except (OSError, UnicodeError) as error:
            why = str(error.strerror or error if isinstance(error, OSError) else "no host can be called so")
            what = f"cannot listen on {shown(self.host)}:{self.port}: {why.partition(' (while')[0]}"
            raise BadConfig(what, _advice(error)) from None
        # Connections have it from the listener. asyncio sets it on sockets alone that were made with their protocol's
        # number; without it the body of a small answer waits 40 ms for the client to have acknowledged the head.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Bound here and not in the thread: a port in use must fail the start, not a thread that nobody watches.
        host, port = listener.getsockname()[:2]
        self._thread = threading.Thread(target=self._server.run, args=([listener],), name="http", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                listener.close()
                raise DaemonError(Reason.CONFIG, "the HTTP server did not start", "the log has the traceback")
            time.sleep(TICK_SECONDS)
        listener.listen(BACKLOG)  # asyncio made it as short as what it accepts at once
        return str(host), int(port)

    def stop(self) -> None:
        """Refuses new connections, lets running answers finish for GRACE_SECONDS, and returns when all is closed."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def wait_for_signal(
        self, reload: Callable[[], None] = lambda: None, listening: Callable[[], None] = lambda: None
    ) -> None:
        """Blocks until SIGINT or SIGTERM, then stops; SIGHUP calls `reload`, or stops where the terminal is gone.

        listening: is called once signals are heard. Call it from the main thread, after `start`.
        """
        assert self._thread is not None, "start first"
        asked = threading.Event()

        def ask(_: int, __: FrameType | None) -> None:
            wake(asked)

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with hearing(reload, lambda: wake(asked)):
                listening()
                while not asked.wait(timeout=1) and self._thread.is_alive():
                    pass
                self.stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __enter__(self) -> tuple[str, int]:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _told(app: ASGIApp, stopping: asyncio.Event, waiters: int) -> ASGIApp:
    """The application, its requests knowing of `stopping`, of `hung_up` and of how many may wait."""

    async def told(scope: Scope, receive: Receive, send: Send) -> None:
        state = {**scope.get("state", {}), "stopping": stopping, "hung_up": hung_up(scope), "waiters": waiters}
        await app({**scope, "state": state}, receive, send)

    return told
