"""Clients that wait for a version: however many there are, the registry is asked in one place.

It is asked, and not told: a version may be committed by another process than the one that serves.
"""

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from daemon.http.answers import Problem

MOST_WAITERS = 256  # each holds a connection
LOOK_SECONDS = 0.25

Lives = Callable[[], Mapping[str, int]]
"""The live version of every head."""

Ends = Callable[[int], bool]
"""Whether that live version is worth an answer."""


class Waiting:
    """Everyone who waits. Belongs to one event loop."""

    def __init__(self, lives: Lives) -> None:
        self._lives = lives
        self._waiters: dict[asyncio.Future[None], tuple[str, Ends]] = {}
        self._looking: asyncio.Task[None] | None = None

    async def until(self, request: Request, head: str, ends: Ends, seconds: float) -> None:
        """Returns once the head's live version is one that `ends` the wait, after `seconds`, or when nobody listens
        any more: the client went away or closed its side of the connection, or the server stops. Problem 503 where too
        many wait already.
        """
        most = min(MOST_WAITERS, request.state.waiters)
        if len(self._waiters) >= most:
            raise Problem(503, "busy", f"{most} clients are waiting already", "try again", {"Retry-After": "5"})
        here: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[here] = head, ends
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        nobody = _gone(request), request.state.stopping.wait(), request.state.hung_up.wait()
        over = [asyncio.ensure_future(end) for end in nobody]
        try:
            await asyncio.wait({here, *over}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._waiters[here]
            for task in over:
                task.cancel()

    async def _look(self) -> None:
        """Asks for the live versions again and again while anyone waits."""
        while self._waiters:
            lives: Mapping[str, int] | None = None
            with suppress(Exception):  # whoever waits asks for itself then, and is told what is wrong
                lives = await run_in_threadpool(self._lives)
            for here, (head, ends) in self._waiters.items():
                if not here.done() and (lives is None or head not in lives or ends(lives[head])):
                    here.set_result(None)
            await asyncio.sleep(LOOK_SECONDS)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
