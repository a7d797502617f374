"""What goes on, as server-sent events: however many listen, the home is looked at in one place, while anyone does.

Each listener is told what has changed since it was last told; who is slow is told the latest, and nothing in between.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from daemon.http.answers import NO_CACHE, Problem

MOST_LISTENERS = 64  # each holds a connection
LOOK_SECONDS = 1.0
BEAT_SECONDS = 15.0  # a comment after so long a silence: proxies and clients know then that we are there
RETRY_MILLISECONDS = 5000
HEADERS = {**NO_CACHE, "X-Accel-Buffering": "no"}  # nginx would keep them until there are many

Look = Callable[[], Mapping[str, str]]
"""All events by name, each as one line of JSON."""


class _Stream(StreamingResponse):
    """A stream whose end is heard, also where nothing of it could be sent."""

    def __init__(self, content: AsyncIterator[str], over: Callable[[], None]) -> None:
        super().__init__(content, headers=HEADERS, media_type="text/event-stream")
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


class Events:
    """Everyone who listens. Belongs to one event loop."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._said: Mapping[str, str] = {}
        self._changed = asyncio.Event()
        self._listeners = 0
        self._looking: asyncio.Task[None] | None = None

    async def answer(self, request: Request) -> Response:
        """The stream, until the client is gone or the server stops. Problem 503 where too many listen."""
        if request.method == "HEAD":
            return Response(headers=HEADERS, media_type="text/event-stream")
        most = min(MOST_LISTENERS, request.state.waiters)
        if self._listeners >= most:
            raise Problem(503, "busy", f"{most} clients are listening already", "try again", {"Retry-After": "15"})
        self._listeners += 1  # here, and not once it is told something: others ask meanwhile
        return _Stream(self._stream(request), self._gone)

    def _gone(self) -> None:
        self._listeners -= 1

    async def _stream(self, request: Request) -> AsyncIterator[str]:
        if self._looking is None or self._looking.done():
            self._said = {}
            self._looking = asyncio.create_task(self._keep_looking())
        ends = [asyncio.ensure_future(end.wait()) for end in (request.state.stopping, request.state.hung_up)]
        try:
            async for text in self._told(ends):
                yield text
        finally:
            for end in ends:
                end.cancel()

    async def _told(self, ends: list[asyncio.Future[bool]]) -> AsyncIterator[str]:
        sent: dict[str, str] = {}
        yield f"retry: {RETRY_MILLISECONDS}\n\n"
        while not any(end.done() for end in ends):
            changed: asyncio.Future[bool] = asyncio.ensure_future(self._changed.wait())
            news = {name: text for name, text in self._said.items() if sent.get(name) != text}
            for name, text in news.items():
                yield f"event: {name}\ndata: {text}\n\n"
            sent |= news
            try:
                done, _ = await asyncio.wait(
                    {changed, *ends}, timeout=BEAT_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
            finally:
                changed.cancel()
            if not done:
                yield ": still here\n\n"

    async def _keep_looking(self) -> None:
        while self._listeners:
            with suppress(Exception):  # the pages say what is wrong; the next look may succeed
                said = await run_in_threadpool(self._look)
                if said != self._said:
                    self._said = said
                    self._changed.set()
                    self._changed = asyncio.Event()
            await asyncio.sleep(LOOK_SECONDS)
