"""The connections: how many there may be, and how long one may keep us waiting.

Every connection is a descriptor, and most that are answered hold a file as well. Merging needs descriptors too, so
connections have a quarter of what the system allows, and an idle one makes room for a newcomer. A client is not waited
for longer than it is honest: it has REQUEST_SECONDS for the head of a request, and takes LEAST_BYTES_PER_SECOND of an
answer at the least, measured over `stall_seconds`. What it sends of an upload is measured in
`daemon.http.upload_routes`.
"""

import asyncio
import json
import resource
import socket
import struct
from typing import Any, cast

import structlog
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol

from daemon.compute.open_files import allow_open_files

MOST_CONNECTIONS = 2000
YOUNG_SECONDS = 1.0  # a connection's first request may be on its way for so long
SHARE = 4  # connections have that part of all descriptors, one in so many; with their files it is twice as much
TOLD = 32  # connections beyond the bound that are told why, instead of only closed
REQUEST_SECONDS = 30.0  # for a whole head, and between two requests
LEAST_BYTES_PER_SECOND = 1024
LOOK_SECONDS = 0.5
LOG_SECONDS = 60.0
ACKED = struct.Struct("120xQ")  # of <linux/tcp.h>: tcp_info's tcpi_bytes_acked


def most_connections() -> int:
    """How many there may be at a time. Raises this process's limit of open files as far as it goes, too."""
    hard = allow_open_files()
    return MOST_CONNECTIONS if hard == resource.RLIM_INFINITY else max(2, min(MOST_CONNECTIONS, hard // SHARE))


class Guard:
    """Holds all connections of one server to these bounds. Belongs to one event loop."""

    def __init__(self, stall_seconds: float, most: int) -> None:
        self.most = most
        self._stall_seconds = stall_seconds
        self._all: dict[Connection, None] = {}  # the oldest first
        self._timer: asyncio.TimerHandle | None = None
        self._logged = float("-inf")

    def admit(self, connection: "Connection") -> None:
        """Lets a connection in, and another one go where they are too many: an idle one, or the newcomer itself."""
        self._all[connection] = None
        if self._timer is None:
            self._timer = connection.loop.call_later(LOOK_SECONDS, self._look, connection.loop)
        if len(self._all) <= self.most:
            return
        now = connection.loop.time()
        idle = next((one for one in self._all if one is not connection and one.makes_room(now)), None)
        self._warn(now)
        if idle:
            self._drop(idle)
        elif len(self._all) <= self.most + TOLD:
            connection.turn_away()
        else:
            self._drop(connection)

    def forget(self, connection: "Connection") -> None:
        """It has ended."""
        self._all.pop(connection, None)

    def _drop(self, connection: "Connection") -> None:
        self.forget(connection)
        connection.transport.abort()

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        try:
            now = loop.time()
            for connection in list(self._all):
                if connection.overdue(now, self._stall_seconds):
                    self._drop(connection)
        finally:
            if self._all:
                self._timer = loop.call_later(LOOK_SECONDS, self._look, loop)

    def _warn(self, now: float) -> None:
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            structlog.get_logger().warning(
                "too many connections: idle ones are closed, others turned away",
                most=self.most,
                hint="raise the limit of open files (ulimit -n, LimitNOFILE=), or see who holds them: ss -tnp",
            )


class Connection(H11Protocol):
    """uvicorn's, held to the bounds, and a client that closes its side after its request, as `nc -N` does, is still
    answered.
    """

    def __init__(self, guard: Guard, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._guard = guard
        self._turned_away = False
        self._exchange: object = None  # what it was about when it was last looked at, and since when
        self._since = self._began = self.loop.time()
        self._window: tuple[float, int] | None = None  # since when something waits for the client; what it had taken

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._guard.admit(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._turned_away:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio takes either
        """True where the connection stays open for an answer that is under way, and no longer."""
        cycle = self.cycle
        if cycle is None or cycle.more_body or cycle.response_complete:
            return False
        cycle.keep_alive = False
        hung_up(cast(Scope, cycle.scope)).set()
        return True

    def idle(self) -> bool:
        """True where no request is being answered, and no answer is still on its way out."""
        answered = self.cycle is None or self.cycle.response_complete
        return bool(answered) and not self.transport.get_write_buffer_size()

    def makes_room(self, now: float) -> bool:
        """True where it may go for a newcomer: it is idle, and no first request is on its way."""
        young = self.cycle is None and now - self._began < YOUNG_SECONDS
        return self.idle() and not young and not self._turned_away

    def turn_away(self) -> None:
        """Says that there are too many, and closes our side; what the client has to say is not listened to."""
        self._turned_away = True
        body = json.dumps(
            {
                "error": "too many connections",
                "reason": "busy",
                "hint": "try again; one connection serves many requests",
            }
        ).encode()
        head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nRetry-After: 5\r\nConnection: close"
        self.transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\n\r\n".encode() + body)
        self.transport.write_eof()  # a connection closed on what was not read is reset, and the answer lost with it

    def overdue(self, now: float, stall_seconds: float) -> bool:
        """True where the client has kept us waiting for too long."""
        if self._turned_away:
            return now - self._since >= LOOK_SECONDS
        exchange = (self.cycle, self.idle())
        if exchange != self._exchange:
            self._exchange, self._since = exchange, now
        if not self.transport.get_write_buffer_size():
            self._window = None
            return self.idle() and now - self._since >= REQUEST_SECONDS
        if self._window is None:
            self._window = now, self._taken()
        began, before = self._window
        if now - began < stall_seconds:
            return False
        self._window = now, self._taken()
        return self._window[1] - before < LEAST_BYTES_PER_SECOND * (now - began)

    def _taken(self) -> int:
        """How many bytes have reached the client's system. What has left our buffer says little of a slow link: the
        system takes megabytes at a time. Where it does not say, on other systems than Linux, nobody is found slow.
        """
        if hasattr(socket, "TCP_INFO"):
            info = self.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, ACKED.size)
            if len(info) == ACKED.size and (acked := ACKED.unpack(info)[0]):  # emulated kernels leave it out
                return int(acked)
        return int(self.loop.time() * 2 * LEAST_BYTES_PER_SECOND)


def hung_up(scope: Scope) -> asyncio.Event:
    """The event of one request, made by whoever needs it first: the client may have hung up before it is looked at."""
    event: asyncio.Event = scope.setdefault("state", {}).setdefault("hung_up", asyncio.Event())
    return event
