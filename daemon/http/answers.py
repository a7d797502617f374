"""What every answer shares: JSON problems, entity tags, preconditions, caching and the security headers."""

import base64
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import format_datetime, parsedate_to_datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from registry.errors import Busy, RegistryError

NO_CACHE = {"Cache-Control": "no-cache"}
FOREVER = "public, max-age=31536000, immutable"
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


class Problem(Exception):
    """An answer that is not what was asked for: HTTP `status`, `reason` as one word, and a `hint` what to do next.

    `headers` go out with it.
    """

    def __init__(
        self, status: int, reason: str, detail: str, hint: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.hint = hint
        self.headers = headers or {}

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """The problem as JSON."""
        body = {"error": str(self), "reason": self.reason, "hint": self.hint}
        return JSONResponse(body, self.status, headers={**NO_CACHE, **SECURITY, **self.headers, **(headers or {})})


def of_registry(error: RegistryError) -> Problem:
    """What to answer where the registry cannot be asked."""
    text = "the registry is busy" if isinstance(error, Busy) else "the registry cannot be read"
    return Problem(503, "registry", text, error.hint)


def root_of(request: HTTPConnection) -> str:
    """What stands before our addresses: nothing, unless a proxy took it off."""
    root: str = request.scope.get("root_path", "")
    return root


def etag(sha256: str) -> str:
    """The strong entity tag of content with this digest (hex)."""
    return f'"sha256:{sha256}"'


def immutable(sha256: str) -> dict[str, str]:
    """The headers of content that never changes under its address; `sha256` in hex.

    Repr-Digest (RFC 9530) is that of the whole content, also where only a part of it or none is sent.
    """
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    return {"ETag": etag(sha256), "Cache-Control": FOREVER, "Repr-Digest": f"sha-256=:{digest}:"}


def http_date(seconds: float) -> str:
    """A time of the file system as Last-Modified has it.

    >>> http_date(0)
    'Thu, 01 Jan 1970 00:00:00 GMT'
    """
    return format_datetime(datetime.fromtimestamp(int(seconds), UTC), usegmt=True)


def precondition(headers: Headers, sha256: str, modified: float | None = None) -> Response | None:
    """304 or 412 where the request's conditions say so, in the order of RFC 9110, 13.2.2; None to go on.

    `modified` is what Last-Modified says, in seconds; without it the conditions on dates are ignored.
    """
    tag = etag(sha256)
    wanted = ",".join(headers.getlist("if-match"))
    if wanted:
        if wanted.strip() != "*" and tag not in _strong(wanted):
            raise _failed("If-Match names another content than this address has")
    elif _after(modified, headers.get("if-unmodified-since")):
        raise _failed("it was modified since")
    held = ",".join(headers.getlist("if-none-match"))
    if held:
        unchanged = held.strip() == "*" or tag in re.findall(r'"[^"]*"', held)  # weak ones count here
    else:
        unchanged = _after(modified, headers.get("if-modified-since")) is False
    # A 304 repeats what guides a cache and nothing else of the content (RFC 9110, 15.4.5).
    return Response(status_code=304, headers={"ETag": tag, "Cache-Control": FOREVER}) if unchanged else None


def _strong(tags: str) -> list[str]:
    return [tag for weak, tag in re.findall(r'(W/)?("[^"]*")', tags) if not weak]


def _after(modified: float | None, date: str | None) -> bool | None:
    """Whether it was modified after that date; None where there is no such date."""
    if modified is None or date is None:
        return None
    try:
        asked = parsedate_to_datetime(date)
    except (ValueError, OverflowError):  # the latter: a year or a zone that no clock has
        return None
    return int(modified) > (asked if asked.tzinfo else asked.replace(tzinfo=UTC)).timestamp()


def _failed(detail: str) -> Problem:
    return Problem(412, "precondition", detail, "ask again without that condition")


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
