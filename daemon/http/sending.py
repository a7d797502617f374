"""One published file as an answer: whole, in one part or in several, or not at all (RFC 9110, 13 to 15).

The file is read by pread from a descriptor that is open already: removing the version meanwhile cannot cut the answer,
and as many clients as like read it at different places.
"""

import os
from collections.abc import AsyncIterator, Sequence
from secrets import token_hex

from anyio import to_thread
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from daemon.http.answers import Problem, http_date, immutable, precondition
from daemon.http.ranges import Malformed, Span, Unsatisfiable, spans
from daemon.manifest import FileEntry

CHUNK_BYTES = 256 << 10
Piece = bytes | Span
"""What a body is made of: bytes as they are, or a span of the file."""


def file_answer(request: Request, descriptor: int, entry: FileEntry) -> Response:
    """The answer to GET or HEAD of one file, which closes the descriptor. Problem 400, 412 or 416."""
    try:
        answer = _answer(request, descriptor, entry)
    except BaseException:
        os.close(descriptor)
        raise
    if not isinstance(answer, _Pinned):
        os.close(descriptor)
    return answer


def _answer(request: Request, descriptor: int, entry: FileEntry) -> Response:
    modified = os.fstat(descriptor).st_mtime
    if unchanged := precondition(request.headers, entry.sha256, modified):
        return unchanged
    kind = "application/json" if entry.name.endswith(".json") else "application/octet-stream"
    headers = {
        **immutable(entry.sha256),
        "Accept-Ranges": "bytes",
        "Last-Modified": http_date(modified),
        "Content-Type": kind,
        "Content-Length": str(entry.size),
    }
    if request.method == "HEAD":  # a range means nothing here (RFC 9110, 14.2)
        return Response(headers=headers)
    wanted = _wanted(request.headers, headers["ETag"], entry.size)
    if wanted is None:
        return _Pinned(descriptor, [(0, entry.size)], 200, headers)
    if len(wanted) == 1:
        first, end = wanted[0]
        part = {"Content-Range": f"bytes {first}-{end - 1}/{entry.size}", "Content-Length": str(end - first)}
        return _Pinned(descriptor, wanted, 206, {**headers, **part})
    boundary = token_hex(16)
    pieces = _multipart(wanted, boundary, entry.size, kind)
    length = sum(len(piece) if isinstance(piece, bytes) else piece[1] - piece[0] for piece in pieces)
    several = {"Content-Type": f"multipart/byteranges; boundary={boundary}", "Content-Length": str(length)}
    return _Pinned(descriptor, pieces, 206, {**headers, **several})


def _wanted(headers: Headers, tag: str, size: int) -> list[Span] | None:
    """What to send; None for everything.

    If-Range counts only with our entity tag: a date cannot tell two versions of the same second apart.
    """
    if "range" not in headers or headers.get("if-range", tag) != tag:
        return None
    try:
        return spans(headers["range"], size)
    except Malformed:
        raise Problem(400, "bad_range", "that is no range of bytes", "for example Range: bytes=0-1023") from None
    except Unsatisfiable:
        what, hint = f"the file has {size} bytes", "ask for a range within it, or without Range for all of it"
        raise Problem(416, "beyond_the_end", what, hint, {"Content-Range": f"bytes */{size}"}) from None


def _multipart(wanted: Sequence[Span], boundary: str, size: int, kind: str) -> list[Piece]:
    """The body of multipart/byteranges."""
    pieces: list[Piece] = []
    for first, end in wanted:
        head = f"--{boundary}\r\nContent-Type: {kind}\r\nContent-Range: bytes {first}-{end - 1}/{size}\r\n\r\n"
        pieces += [head.encode(), (first, end), b"\r\n"]
    return [*pieces, f"--{boundary}--\r\n".encode()]


class _Pinned(StreamingResponse):
    """Sends pieces of a file, and closes its descriptor at the end, however that comes."""

    def __init__(self, descriptor: int, pieces: Sequence[Piece], status: int, headers: dict[str, str]) -> None:
        self._descriptor = descriptor
        super().__init__(_chunks(descriptor, pieces), status, headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self._descriptor)


async def _chunks(descriptor: int, pieces: Sequence[Piece]) -> AsyncIterator[bytes]:
    for piece in pieces:
        if isinstance(piece, bytes):
            yield piece
            continue
        at, end = piece
        while at < end:
            chunk = await to_thread.run_sync(os.pread, descriptor, min(CHUNK_BYTES, end - at), at)
            if not chunk:
                raise OSError("the file has become shorter than its manifest says")  # cuts the answer short
            at += len(chunk)
            yield chunk
