"""Experts' views: each is computed while it is sent, so it has no digest, no ranges, and only so many at a time.

Computing one needs torch, which is imported by the first request for one.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from threading import BoundedSemaphore, Lock
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from daemon.errors import DaemonError
from daemon.http.answers import NO_CACHE, Problem
from daemon.http.files import Published, damaged
from daemon.notation import called
from projector.errors import ProjectorError
from registry.records import Expert, Head, Version

if TYPE_CHECKING:
    from daemon.versions.view_file import OpenView

AT_ONCE = 2  # views in the making: each keeps a core busy
RETRY_SECONDS = 5
SUMS_KEPT = 256
HEADERS = {**NO_CACHE, "Accept-Ranges": "none"}

Sums = Mapping[str, float]


class Views:
    """The views of one home's experts."""

    def __init__(self, published: Published) -> None:
        self._published = published
        self._free = BoundedSemaphore(AT_ONCE)
        self._sums: OrderedDict[tuple[str, int, int], Sums] = OrderedDict()
        self._remembering = Lock()

    def weights(self, request: Request, head: Head, version: Version, expert: Expert) -> Response:
        """An expert's weights in `version`, in the dtype of the version, as one file. Problem 404, 410, 500 or 503."""
        view = self._open(head, version, expert)
        if request.method == "HEAD":
            size = view.size
            view.close()
            return Response(headers={**HEADERS, "Content-Length": str(size)}, media_type="application/octet-stream")
        if not self._free.acquire(blocking=False):
            view.close()
            raise Problem(
                503, "busy", f"{AT_ONCE} views are being computed already", f"try again in {RETRY_SECONDS} seconds"
            )
        try:
            key = (head.name, version.number, expert.id)
            return _Computed(view.chunks(self._known(key, view)), view.size, partial(self._done, view))
        except BaseException:
            self._done(view)
            raise

    def _open(self, head: Head, version: Version, expert: Expert) -> "OpenView":
        from daemon.versions.view_file import OpenView

        home, n, came_with = self._published.home, version.number, expert.version
        if came_with is None or not merged_at(expert, n):
            raise Problem(
                404,
                "not_merged",
                f"{called(head.name, n)} does not have this expert",
                "GET /v1/lineage lists the merged experts with the version that each came with",
            )
        if not home.views(head.name).is_dir():
            raise Problem(
                404,
                "no_views",
                f"head {head.name} keeps nothing of its experts: its method is {head.method}",
                "views are those of a head whose method is emr: `mainstem rebuild --head emr=emr` adds one",
            )
        if not home.view_record(head.name, came_with).is_file():
            raise damaged(head, came_with, "what is kept of its expert")
        dtype: str = self._published.manifest(head, version).content["dtype"]
        try:
            return OpenView(home, head, version, dtype, came_with)
        except FileNotFoundError:
            raise self._published.missing(head, n) from None
        except (ProjectorError, DaemonError) as error:
            raise damaged(head, n, "the state") from error

    def _known(self, key: tuple[str, int, int], view: "OpenView") -> Sums:
        with self._remembering:
            if key in self._sums:
                self._sums.move_to_end(key)
                return self._sums[key]
        sums = view.sums()
        with self._remembering:
            self._sums[key] = sums
            while len(self._sums) > SUMS_KEPT:
                self._sums.popitem(last=False)
        return sums

    def _done(self, view: "OpenView") -> None:
        view.close()
        self._free.release()


def merged_at(expert: Expert, n: int) -> bool:
    """True where a version n that comes from this expert's still has it: it is merged, and not withdrawn by then."""
    came, went = expert.version, expert.withdrawn_in
    return came is not None and came <= n and (went is None or n < went)


class _Computed(StreamingResponse):
    """Sends what is computed on the way; `done` is called at the end, however the answer ends."""

    def __init__(self, chunks: Iterator[bytes], size: int, done: Callable[[], None]) -> None:
        self._done = done
        headers = {**HEADERS, "Content-Length": str(size)}
        super().__init__(chunks, headers=headers, media_type="application/octet-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()
