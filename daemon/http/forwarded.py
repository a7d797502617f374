"""What a proxy in front says of the address that was asked: X-Forwarded-Proto and -For, as uvicorn reads them, and
X-Forwarded-Prefix, the path that it took off. Believed of those proxies alone that http.trusted_proxies names.

A module of its own beside `hosts.py`: by which name we may be asked is not theirs to say. That is the Host header's,
whoever passes it on.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

PREFIX = re.compile(r"(/[\w.~%-]+)+", re.ASCII)


class Forwarded:
    """ASGI middleware: the scheme, the client and the path as they were before the proxy."""

    def __init__(self, app: ASGIApp, proxies: Sequence[str]) -> None:
        """`proxies`: addresses and networks, or `*` for whoever asks."""
        self._app = app
        self._read = ProxyHeadersMiddleware(cast(Any, app), ["*"] if "*" in proxies else list(proxies))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client")
        if scope["type"] == "http" and (client[0] if client else None) in self._read.trusted_hosts:
            prefix = Headers(scope=scope).get("x-forwarded-prefix", "").rstrip("/")
            if PREFIX.fullmatch(prefix) and not {".", ".."} & set(prefix.split("/")):
                raw = prefix.encode() + scope["raw_path"]
                scope = {**scope, "root_path": prefix, "path": prefix + scope["path"], "raw_path": raw}
        await self._read(cast(Any, scope), cast(Any, receive), cast(Any, send))
