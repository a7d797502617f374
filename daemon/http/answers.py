"""What every answer shares: JSON problems, entity tags, caching and the security headers."""

import base64
import re
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NO_CACHE = {"Cache-Control": "no-cache"}
FOREVER = "public, max-age=31536000, immutable"
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class Problem(Exception):
    """An answer that is not what was asked for: HTTP `status`, `reason` as one word, and a `hint` what to do next."""

    def __init__(self, status: int, reason: str, detail: str, hint: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.hint = hint

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The problem as JSON."""
        body = {"error": str(self), "reason": self.reason, "hint": self.hint}
        return JSONResponse(body, self.status, headers={**NO_CACHE, **SECURITY, **(headers or {})})


def etag(sha256: str) -> str:
    """The strong entity tag of content with this digest (hex)."""
    return f'"sha256:{sha256}"'


def immutable(sha256: str) -> dict[str, str]:
    """The headers of content that never changes under its address; `sha256` in hex."""
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {"ETag": etag(sha256), "Cache-Control": FOREVER, "Repr-Digest": f"sha-256=:{digest}:"}


def not_modified(headers: Headers, sha256: str) -> Response | None:
    """304 where If-None-Match (a list, weak tags included, or `*`) names what we would send."""
    asked = ",".join(headers.getlist("if-none-match"))
    if asked.strip() == "*" or etag(sha256) in re.findall(r'"[^"]*"', asked):
        return Response(status_code=304, headers=immutable(sha256))
    return None


class SecurityHeaders:
    """ASGI middleware: every answer carries the security headers, unless it set its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, guarded)
