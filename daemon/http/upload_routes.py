"""PUT, POST and DELETE of experts: who may, and the bytes on their way to `daemon.arrivals.uploads`.

A browser sends no bearer token on behalf of a foreign page, so a page that its user happens to visit cannot upload
anything: no other protection against cross-site requests is needed.
"""

import asyncio
import base64
import hmac
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import anyio
import structlog
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from daemon.arrivals.receiving import Incoming, Stored
from daemon.arrivals.uploads import Uploads
from daemon.config import taking_effect
from daemon.disk.durable import is_full
from daemon.errors import NotUploaded, Reason
from daemon.http.answers import NO_CACHE, Problem, root_of
from daemon.http.connections import LEAST_BYTES_PER_SECOND

WRITE_BYTES = 1 << 20  # gathered before they are written, however small the pieces that come
LINGER_SECONDS = 5  # how long the rest of a body is read, and thrown away, for its sender to see why it is refused
LINGER_BYTES = 64 << 20
LIST_BYTES = 1 << 20
STATUS = {
    Reason.UPLOAD_NAME: 400,
    Reason.UPLOAD_DIGEST: 400,
    Reason.UPLOAD_MISSING: 404,
    Reason.UPLOAD_TAKEN: 409,
    Reason.UPLOAD_UNFINISHED: 409,
    Reason.UPLOAD_SIZE: 413,
    Reason.UPLOAD_LIMIT: 503,
    Reason.UPLOAD_SPACE: 507,
}
_SHA256 = re.compile(r"(?:^|,)[ \t]*sha-256=([^,;]*)")

Endpoint = Callable[[Request], Awaitable[Response]]


class UploadRoutes:
    """The endpoints. `ready` returns why nothing can be taken yet, None where it can."""

    def __init__(self, uploads: Uploads, ready: Callable[[], str | None]) -> None:
        self._uploads = uploads
        self._ready = ready
        self._log = structlog.get_logger()

    async def expert(self, request: Request) -> Response:
        """PUT of an expert that is one file; DELETE of a folder's upload."""
        return await self._guarded(request, self._abandon if request.method == "DELETE" else self._put)

    async def file(self, request: Request) -> Response:
        """PUT of one file of a folder."""
        return await self._guarded(request, self._put)

    async def commit(self, request: Request) -> Response:
        """POST: the folder is complete."""
        return await self._guarded(request, self._commit)

    async def _guarded(self, request: Request, endpoint: Endpoint, *, anyone: bool = False) -> Response:
        """The endpoint's answer, or why there is none. anyone: without the token, too."""
        body = _Body(request.receive)
        request = Request(request.scope, body)
        try:
            if not anyone:
                self._authorise(request)
            if why_not := self._ready():
                raise Problem(503, "not_ready", why_not, "try again", {"Retry-After": "5"})
            return await endpoint(request)
        except Problem as refused:
            return _Refusal(self._told(refused), body)
        except NotUploaded as error:
            problem = Problem(STATUS[Reason(error.reason)], str(error.reason), str(error), error.hint)
        except TimeoutError:
            detail = (
                f"less than {LEAST_BYTES_PER_SECOND} bytes a second came for {self._uploads.stall_seconds:g} seconds"
            )
            problem = Problem(408, "stalled", detail, "send it again")
        except OSError as error:
            if not is_full(error):
                raise
            problem = Problem(
                507, str(Reason.UPLOAD_SPACE), "the disk is full", "make room on the home's disk, then send it again"
            )
        except ClientDisconnect:
            return Response()  # nobody hears it
        self._log.warning("an upload was refused", reason=problem.reason, detail=str(problem))
        return _Refusal(self._told(problem), body)

    def _told(self, problem: Problem) -> Problem:
        """A problem in the words of whoever asks."""
        return problem

    def _authorise(self, request: Request) -> None:
        token = self._uploads.token
        if token is None:
            raise Problem(
                403,
                "uploads_off",
                "this daemon takes no uploads",
                taking_effect("drop files into its inbox, or set http.write_token_file"),
            )
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if not hmac.compare_digest(given.strip().encode("latin-1"), token.encode()) or scheme.lower() != "bearer":
            raise Problem(
                401,
                "unauthorised",
                "this needs the write token",
                "send the header Authorization: Bearer TOKEN",
                {"WWW-Authenticate": 'Bearer realm="mainstem"'},
            )

    async def _put(self, request: Request) -> Response:
        expert: str = request.path_params["name"]
        file: str | None = request.path_params.get("file")
        digests = _digests(request.headers)
        length = request.headers.get("content-length")
        incoming = await run_in_threadpool(self._uploads.begin, expert, file, int(length) if length else None)
        try:
            await receive(Stream(request, self._uploads.stall_seconds), incoming)
            stored = await run_in_threadpool(self._uploads.finish, incoming, digests)
        except BaseException as error:
            outcome = "refused" if isinstance(error, NotUploaded) else "broken"
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self._uploads.drop, incoming, outcome)
            raise
        if file is not None:
            commit = f"{root_of(request)}/v1/experts/{expert}/commit"
            return JSONResponse({**_row(stored), "commit": commit}, 201, headers=NO_CACHE)
        self._log.info("uploaded", drop=expert, size_bytes=stored.size_bytes, sha256=stored.sha256)
        merged = f"{root_of(request)}/v1/experts/{stored.sha256}"  # one file: it is known by its own sha256
        body = {**_row(stored), "merged": merged, "experts": f"{root_of(request)}/v1/experts"}
        return JSONResponse(body, 201, headers={**NO_CACHE, "Location": merged})

    async def _commit(self, request: Request) -> Response:
        expert: str = request.path_params["name"]
        wanted = _listed(await short_body(Stream(request, self._uploads.stall_seconds)))
        files = await run_in_threadpool(self._uploads.commit, expert, wanted)
        self._log.info("uploaded", drop=expert, size_bytes=sum(file.size_bytes for file in files), files=len(files))
        experts = f"{root_of(request)}/v1/experts"
        body = {"name": expert, "files": [_row(file) for file in files], "experts": experts}
        return JSONResponse(body, 201, headers={**NO_CACHE, "Location": experts})

    async def _abandon(self, request: Request) -> Response:
        await run_in_threadpool(self._uploads.abandon, request.path_params["name"])
        return Response(status_code=204, headers=NO_CACHE)


class _Body:
    """What is received of a request; `over` once there is no more of it."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.over = False

    async def __call__(self) -> Message:
        message = await self._receive()
        self.over = message["type"] != "http.request" or not message.get("more_body", False)
        return message


class _Refusal(Response):
    """A problem that is told before all of the body has come: the rest is read for a while, and thrown away.

    A connection that is closed on a sender who is still sending is reset, and the answer lost with it.
    """

    def __init__(self, problem: Problem, body: _Body) -> None:
        self._rest = body
        answer = problem.response({"Connection": "close"})
        super().__init__(answer.body, answer.status_code)
        self.raw_headers = answer.raw_headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        left = 0 if Headers(scope=scope).get("expect") else LINGER_BYTES  # who expects a word has not begun to send
        with anyio.move_on_after(LINGER_SECONDS):
            while left > 0 and not self._rest.over:
                left -= len((await self._rest()).get("body", b""))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class Pieces(Protocol):
    """What comes, bit by bit."""

    async def next(self) -> bytes:
        """The next piece, empty at the end."""


class Stream:
    """A body in pieces, at an honest pace.

    TimeoutError where nothing comes for `stall_seconds`, or less than LEAST_BYTES_PER_SECOND (the time that we take
    between two pieces does not count), ClientDisconnect where it ends early.
    """

    def __init__(self, request: Request, stall_seconds: float) -> None:
        self._pieces = request.stream()
        self._stall_seconds = stall_seconds
        self._came = 0
        self._waited = 0.0

    async def next(self) -> bytes:
        """The next piece, empty at the end."""
        began = time.monotonic()
        async with asyncio.timeout(self._stall_seconds):
            piece = await anext(self._pieces)
        self._came += len(piece)
        self._waited += time.monotonic() - began
        if self._waited >= self._stall_seconds:
            if self._came < LEAST_BYTES_PER_SECOND * self._waited:
                raise TimeoutError
            self._came, self._waited = 0, 0.0
        return piece


async def receive(stream: Pieces, incoming: Incoming) -> None:
    """Writes all that comes."""
    gathered = bytearray()
    while piece := await stream.next():
        gathered += piece
        if len(gathered) >= WRITE_BYTES:
            await run_in_threadpool(incoming.write, bytes(gathered))
            gathered.clear()
    await run_in_threadpool(incoming.write, bytes(gathered))


async def short_body(stream: Stream) -> bytes:
    """A short body."""
    body = b""
    while piece := await stream.next():
        body += piece
        if len(body) > LIST_BYTES:
            raise Problem(413, "too_long", f"a list may have {LIST_BYTES} bytes", "name each file once")
    return body


def _digests(headers: Headers) -> set[str]:
    """Every sha256, in hex, that Content-Digest and Repr-Digest name (RFC 9530): the content comes as it is, so both
    are of the same bytes. Problem 400 or 415.
    """
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise Problem(415, "encoded", "the content is encoded", "send the file's own bytes")
    if "content-range" in headers:
        raise Problem(400, "partial", "a part of a file cannot be sent", "send it whole")
    found = set()
    for value in _SHA256.findall(",".join(headers.getlist("content-digest") + headers.getlist("repr-digest"))):
        quoted = re.fullmatch(r"[ \t]*:([A-Za-z0-9+/]{43}=):[ \t]*", value)
        if quoted is None:
            raise Problem(400, "bad_digest", "that is no sha-256", "sha-256=:BASE64:, 44 characters between the colons")
        found.add(base64.b64decode(quoted[1]).hex())
    return found


def _listed(body: bytes) -> dict[str, str] | None:
    """The sha256 of each file by name, as a commit lists them; None where it does not. Problem 400."""
    if not body.strip():
        return None
    try:
        files: Any = json.loads(body)["files"]
        return {str(file["name"]): str(file["sha256"]).lower() for file in files}
    except (ValueError, KeyError, TypeError, RecursionError):
        hint = '{"files": [{"name": "model.safetensors", "sha256": "<hex>"}]}, or an empty body'
        raise Problem(400, "bad_list", "that is no list of files", hint) from None


def _row(stored: Stored) -> dict[str, object]:
    return {"name": stored.name, "size_bytes": stored.size_bytes, "sha256": stored.sha256}
