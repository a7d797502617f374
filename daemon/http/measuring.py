"""What is asked and what is sent, counted: by the address as the routing table has it, never as it was asked, so that
nobody can make a series.
"""

import re
from collections.abc import Sequence
from time import perf_counter

from starlette.routing import BaseRoute, Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from daemon.metrics import OTHER, HttpMetrics

KIND = re.compile(r":\w+}")  # what a parameter of a template may be
GONE = "none"  # the status where nobody waited for an answer


class Measured:
    """ASGI middleware, the outermost: what the others refuse is counted too."""

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute], metrics: HttpMetrics) -> None:
        self._app = app
        self._routes = [(route, KIND.sub("}", route.path)) for route in routes if isinstance(route, Route)]
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status, route = perf_counter(), GONE, self._route(scope)
        seconds, sent_bytes = self._metrics.seconds.labels(route), self._metrics.sent_bytes.labels(route)
        with_body = scope["method"] != "HEAD"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
                seconds.observe(perf_counter() - begun)
            await send(message)
            if with_body and message["type"] == "http.response.body":
                sent_bytes.inc(len(message.get("body", b"")))

        try:
            with self._metrics.in_progress.track_inprogress():
                await self._app(scope, receive, counted)
        except Exception:  # Starlette answers it, further out than any middleware of ours
            status = "500" if status == GONE else status
            raise
        finally:
            self._metrics.requests.labels(route, status).inc()

    def _route(self, scope: Scope) -> str:
        """The template of the address; of one that takes other methods only, too."""
        return next((name for route, name in self._routes if route.matches(scope)[0] is not Match.NONE), OTHER)
