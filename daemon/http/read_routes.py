"""What is read over HTTP: heads, versions, files, experts, and how the daemon is."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from urllib.parse import quote, urlencode

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from daemon.checkpoints.weight_names import weight_names
from daemon.home.health import Trouble
from daemon.home.standing import held
from daemon.http.answers import NO_CACHE, Problem, immutable, precondition, root_of
from daemon.http.computing import Views
from daemon.http.drops import Drops, Sent
from daemon.http.files import Published
from daemon.http.finding import merged
from daemon.http.rows import Row, base_row, data_row, expert_row, head_row, version_row
from daemon.http.sending import file_answer
from daemon.http.waiting import Waiting
from daemon.layout import Home, is_weights
from daemon.manifest import FileEntry
from daemon.notation import called
from registry.reader import Reader
from registry.records import Expert, Head, Status, Version

PAGE_LIMIT = 1000  # rows in one answer, at the most
WAIT_SECONDS = 30.0  # for a version, unless told otherwise
LONGEST_WAIT_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Wait:
    """What a client waits for: version `wanted` or a later one, or another than the one that it has; and how long."""

    wanted: int | None
    has: int | None
    seconds: float

    def is_over(self, live: int) -> bool:
        return (self.wanted is not None and live >= self.wanted) or (self.has is not None and live != self.has)


class ReadRoutes:
    """The endpoints. Plain methods run in a worker thread, since they read the registry and the disk."""

    def __init__(
        self,
        home: Home,
        reader: Reader,
        metrics: CollectorRegistry,
        troubles: Callable[[], Sequence[Trouble]],
        hung: Callable[[], str | None],
        sent: Sent = lambda _: None,
    ) -> None:
        """sent: what of an upload has come."""
        self.home = home
        self.reader = reader
        self.metrics = metrics
        self.troubles = troubles
        self.hung = hung
        self.drops = Drops(home, reader, sent)
        self.published = Published(home, reader)
        self.views = Views(self.published)
        self.waiting = Waiting(lambda: {head.name: head.live for head in reader.heads()})

    async def livez(self, _: Request) -> Response:
        if why := self.hung():
            body = {"live": False, "error": why, "reason": "hung", "hint": "restart the daemon; nothing is lost"}
            return JSONResponse(body, 503, headers=NO_CACHE)
        return JSONResponse({"live": True}, headers=NO_CACHE)

    def readyz(self, _: Request) -> Response:
        troubles = self.troubles()
        if not troubles:
            return JSONResponse({"ready": True}, headers=NO_CACHE)
        body = {
            "ready": False,
            "error": "; ".join(trouble.text for trouble in troubles),
            "reason": troubles[0].reason,
            "hint": "; ".join(dict.fromkeys(trouble.hint for trouble in troubles)),
            "troubles": [asdict(trouble) for trouble in troubles],
        }
        return JSONResponse(body, 503, headers=NO_CACHE)

    def scrape(self, request: Request) -> Response:
        try:
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
        except (ValueError, TypeError):  # its version parameter is no version
            encode, content_type = choose_encoder("")
        return Response(encode(self.metrics), headers={**NO_CACHE, "Content-Type": content_type})

    def heads(self, request: Request) -> Response:
        heads = self.reader.heads()
        live = {head.name: self.reader.version(head.name, head.live) for head in heads}
        ids = {name: version.evaluation if version else None for name, version in live.items()}
        said = self.reader.evaluations(ids.values())
        root = root_of(request)
        rows = [
            head_row(head, held(self.published.home, self.reader, head), said.get(ids[head.name] or 0), root)
            for head in heads
        ]
        return JSONResponse({"heads": rows}, headers=NO_CACHE)

    async def latest(self, request: Request) -> Response:
        name = request.path_params["head"]
        wait = _wait(request)
        head = await run_in_threadpool(self.published.head, name)
        if wait and not wait.is_over(head.live):
            begun = head.live
            # Further back than where the wait began: the head was rolled back, and who waits has what is live no more.
            await self.waiting.until(request, head.name, lambda live: live < begun or wait.is_over(live), wait.seconds)
            head = await run_in_threadpool(self.published.head, name)
            if head.live >= begun and not wait.is_over(head.live):
                return Response(status_code=204, headers=NO_CACHE)
        return RedirectResponse(f"versions/{head.live}", 307, headers=NO_CACHE)

    def latest_file(self, request: Request) -> Response:
        head = self.published.head(request.path_params["head"])
        entry = self._entry(head, self.published.version(head, head.live), request.path_params["name"])
        # Relative, for a proxy may have put something before it; a slash in the name may have come as %2F.
        up = "../" * (2 + request.scope["raw_path"].partition(b"/latest/files/")[2].count(b"/"))
        address = f"{up}versions/{head.live}/files/{quote(entry.name)}"
        return RedirectResponse(address, 307, headers=NO_CACHE)

    def versions(self, request: Request) -> Response:
        head = self.published.head(request.path_params["head"])
        limit, before = _limit(request), _query_number(request, "before", None)
        rows = self.reader.versions(head.name, limit=limit, before=before)
        last = rows[-1].number if len(rows) == limit else 0  # and before version 0 there is none
        said = self.reader.evaluations(row.evaluation for row in rows)
        body = {
            "head": head.name,
            "live": head.live,
            "versions": [version_row(row, head, said.get(row.evaluation or 0)) for row in rows],
            "next": _next(request, limit, before=last) if last else None,
        }
        return JSONResponse(body, headers=NO_CACHE)

    def version(self, request: Request) -> Response:
        head = self.published.head(request.path_params["head"])
        row = self.published.version(head, _number(request))
        unchanged = precondition(request.headers, row.manifest_sha256)
        if unchanged is not None:
            return unchanged
        manifest = self.published.manifest(head, row)
        return Response(manifest.raw, headers=immutable(row.manifest_sha256), media_type="application/json")

    def data(self, request: Request) -> Response:
        head = self.published.head(request.path_params["head"])
        version = self.published.row(head, _number(request))
        limit = _limit(request, PAGE_LIMIT)
        rows = self.reader.experts_in(version.number, _query_number(request, "after", None, least=0) or 0, limit)
        last = rows[-1].version if len(rows) == limit else None
        body = {
            "head": head.name,
            "version": version.number,
            "experts": [data_row(row) for row in rows],
            "next": _next(request, limit, after=last) if last else None,
        }
        return JSONResponse(body, headers=NO_CACHE)

    def file(self, request: Request) -> Response:
        head = self.published.head(request.path_params["head"])
        row = self.published.version(head, _number(request))
        return self._file(request, head, row)

    def view(self, request: Request) -> Response:
        head = self.published.head(request.path_params["head"])
        row = self.published.version(head, _number(request))
        expert = merged(self.reader, request.path_params["expert"], row.number)
        name: str = request.path_params["name"]
        weights = weight_names(self.published.manifest(head, row).files).whole
        if name == weights:
            return self.views.weights(request, head, row, expert)
        if is_weights(name):
            raise Problem(404, "unknown_file", "a view has no such file", f"its weights are all in {weights}")
        return self._file(request, head, row)

    def _file(self, request: Request, head: Head, row: Version) -> Response:
        entry = self._entry(head, row, request.path_params["name"])
        return file_answer(request, self.published.open(head, row, entry), entry)

    def _entry(self, head: Head, row: Version, name: str) -> FileEntry:
        entry = self.published.manifest(head, row).files.get(name)
        if entry is None:
            raise Problem(
                404,
                "unknown_file",
                f"{called(head.name, row.number)} has no such file",
                f"GET /v1/heads/{head.name}/versions/{row.number} lists its files",
            )
        return entry

    def experts(self, request: Request) -> Response:
        wanted = request.query_params.get("status")
        if wanted is not None and wanted not in list(Status):
            raise Problem(400, "bad_query", "no expert has that status", f"one of: {', '.join(Status)}")
        limit = _limit(request)
        before = _query_number(request, "before", None)
        rows = self.reader.experts(status=Status(wanted) if wanted else None, limit=limit, before=before)
        last = rows[-1].id if len(rows) == limit else None
        body = {
            "experts": self._expert_rows(rows),
            "next_before": last,
            "next": _next(request, limit, before=last) if last else None,
        }
        return JSONResponse(body, headers=NO_CACHE)

    def expert(self, request: Request) -> Response:
        (words,) = request.path_params.values()
        if undecided := self.drops.undecided(words):
            return JSONResponse(undecided, 202, headers=NO_CACHE)
        found = self.drops.arrivals(words)
        # The same bytes may have arrived often: the one that was merged speaks for all, else the newest.
        chosen = max(found, key=lambda row: (row.status is Status.MERGED, row.id))
        (row,) = self._expert_rows([chosen])
        body = {**row, **self.drops.decided(chosen), "arrivals": sorted(one.id for one in found)}
        return JSONResponse(body, headers=NO_CACHE)

    def _expert_rows(self, experts: Sequence[Expert]) -> list[Row]:
        said = self.reader.evaluations(expert.evaluation for expert in experts)
        return [expert_row(expert, self.home, said.get(expert.evaluation or 0)) for expert in experts]

    def lineage(self, request: Request) -> Response:
        limit = _limit(request, PAGE_LIMIT)  # a small home's lineage is one page
        after = _query_number(request, "after", None, least=0) or 0
        rows = self.reader.lineage(after, limit)
        last = rows[-1].version if len(rows) == limit else None
        body = {
            "base": base_row(self.reader.base()),
            "experts": self._expert_rows(rows),
            "next": _next(request, limit, after=last) if last else None,
        }
        return JSONResponse(body, headers=NO_CACHE)


def _number(request: Request) -> int:
    text = request.path_params["n"]
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise Problem(404, "unknown_version", "a version is a number", "GET the head's versions for a list")
    return int(text)


def _query_number(request: Request, name: str, default: int | None, least: int = 1) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return default
    if not re.fullmatch(r"[0-9]{1,12}", text) or int(text) < least:
        raise Problem(400, "bad_query", f"{name} must be a whole number from {least} on", f"for example ?{name}=100")
    return int(text)


def _next(request: Request, limit: int, **cursor: int) -> str:
    """The address of the page behind this one: as it was asked for, with the cursor moved on."""
    asked = {**dict(request.query_params), "limit": limit, **cursor}
    return f"{request.url.path}?{urlencode(asked)}"


def _wait(request: Request) -> Wait | None:
    """What to wait for; None for nothing. Problem 400."""
    wanted, has = _query_number(request, "wait_for", None, least=0), _query_number(request, "have", None, least=0)
    seconds = request.query_params.get("timeout")
    if wanted is None and has is None:
        if seconds is not None:
            raise Problem(400, "bad_query", "timeout is for wait_for and have", "for example ?wait_for=12&timeout=30")
        return None
    if seconds is None:
        return Wait(wanted, has, WAIT_SECONDS)
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", seconds) or float(seconds) > LONGEST_WAIT_SECONDS:
        limit = f"0 to {LONGEST_WAIT_SECONDS:.0f}"
        raise Problem(400, "bad_query", f"timeout must be {limit} seconds", "ask again when it is over")
    return Wait(wanted, has, float(seconds))


def _limit(request: Request, default: int = 100) -> int:
    return min(_query_number(request, "limit", None) or default, PAGE_LIMIT)
