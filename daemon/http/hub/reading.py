"""What the Hub's clients read: a model, the tree of its files, its revisions, and the files themselves.

Whoever asks for `main` is led to the commit that it is just then: the next request of the same client, for the bytes or
for another file, then means the same version, whatever becomes live between the two.
"""

import json
import re
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.concurrency import run_in_threadpool
from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from daemon.http.answers import NO_CACHE, Problem, root_of
from daemon.http.files import Published
from daemon.http.hub.repos import LIVE, NAMESPACE, Listing, Repos, Snapshot, commit_of, hub_problem, no_repo, told
from daemon.http.sending import file_answer
from daemon.http.upload_routes import Stream, short_body
from daemon.manifest import FileEntry

MOST_REFS = 1000  # versions that are listed as tags
READING = ("GET", "HEAD")
METHODS = (*READING, "POST", "PUT", "PATCH", "DELETE")
PATHS_SECONDS = 10.0  # for a question for some paths to come, or the next piece of it

Row = dict[str, Any]


class HubReading:
    """The endpoints. Plain methods run in a worker thread, since they read the registry and the disk. `pushed`: what
    has come of a repository that is being pushed, None where it is none.
    """

    def __init__(self, published: Published, pushed: Callable[[str], Listing | None]) -> None:
        self.published = published
        self.repos = Repos(published)
        self._pushed = pushed

    def models(self, _: Request) -> Response:
        """The heads; whatever else is asked for."""
        rows = []
        for head in self.published.reader.heads():
            live = self.published.row(head, head.live)
            name = f"{NAMESPACE}/{head.name}"
            rows.append({"id": name, "modelId": name, "sha": commit_of(live), "private": False, "tags": ["mainstem"]})
        return JSONResponse(rows, headers=NO_CACHE)

    def access(self, request: Request) -> Response:
        """Whether it may be read: all that is there may."""
        self.repos.head(request.path_params["repo"])
        return JSONResponse({}, headers=NO_CACHE)

    def model(self, request: Request) -> Response:
        snapshot = self._listing(request)
        blobs = request.query_params.get("blobs", "").lower() in ("1", "true")
        made = _time(snapshot.made)
        body = {
            "_id": snapshot.commit[:24],
            "id": f"{NAMESPACE}/{snapshot.repo}",
            "modelId": f"{NAMESPACE}/{snapshot.repo}",
            "author": NAMESPACE,
            "sha": snapshot.commit,
            "createdAt": made,
            "lastModified": made,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": ["safetensors", "mainstem"],
            **({"library_name": "peft"} if "adapter_config.json" in snapshot.files else {}),
            "siblings": [
                {"rfilename": name, **(_blob(entry) if blobs else {})} for name, entry in snapshot.files.items()
            ],
        }
        return JSONResponse(body, headers=_headers(snapshot))

    def tree(self, request: Request) -> Response:
        snapshot = self._listing(request)
        folder = request.path_params.get("folder", "").strip("/")
        recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
        rows = list(_tree(snapshot, f"{folder}/" if folder else "", recursive))
        if folder and not rows:
            raise _no_entry(snapshot, folder)
        return JSONResponse(rows, headers=_headers(snapshot))

    async def paths(self, request: Request) -> Response:
        """POST, for it may name many; it changes nothing."""
        try:
            body = await short_body(Stream(request, PATHS_SECONDS))
        except TimeoutError:
            raise Problem(408, "stalled", "too little came", "send it again") from None
        except ClientDisconnect:
            return Response()  # nobody hears it
        wanted = _paths(body, request.headers.get("content-type", ""))
        snapshot = await run_in_threadpool(self._listing, request)
        every = {row["path"]: row for row in _tree(snapshot, "", recursive=True)}
        found = [every[path] for path in dict.fromkeys(wanted) if path in every]
        return JSONResponse(found, headers=_headers(snapshot))

    def refs(self, request: Request) -> Response:
        head = self.repos.head(request.path_params["repo"])
        rows = self.published.reader.versions(head.name, limit=MOST_REFS, include_collected=False)
        live = self.published.row(head, head.live)
        body = {
            "branches": [{"name": LIVE, "ref": f"refs/heads/{LIVE}", "targetCommit": commit_of(live)}],
            "converts": [],
            "tags": [
                {"name": f"v{row.number}", "ref": f"refs/tags/v{row.number}", "targetCommit": commit_of(row)}
                for row in rows
            ],
        }
        return JSONResponse(body, headers=NO_CACHE)

    def file(self, request: Request) -> Response:
        snapshot = self._listing(request)
        name: str = request.path_params["name"]
        entry = snapshot.files.get(name)
        if entry is None:
            raise _no_entry(snapshot, name)
        if not isinstance(snapshot, Snapshot):
            hint = f"GET /v1/experts/{snapshot.repo} says what becomes of it"
            raise hub_problem(404, "EntryNotFound", "unknown_file", "what is pushed is merged, and not read", hint)
        linked = {
            "X-Repo-Commit": snapshot.commit,
            "X-Linked-Etag": f'"{entry.sha256}"',  # what a client calls the file in its cache
            "X-Linked-Size": str(entry.size),
        }
        if snapshot.moving:
            # From the root on: some clients put its path into their own address, instead of resolving it.
            where = f"{root_of(request)}/{NAMESPACE}/{snapshot.repo}/resolve/{snapshot.commit}/{quote(name)}"
            return RedirectResponse(where, 307, headers={**NO_CACHE, **linked})
        answer = file_answer(request, self.published.open(snapshot.head, snapshot.version, entry), entry)
        answer.headers.update(linked)
        return answer

    def foreign(self, request: Request) -> Response:
        """Whatever repository is none of ours, so that the clients say that, and not that something failed."""
        raise no_repo(request.path_params["repo"])

    def missing(self, request: Request) -> Response:
        """What the Hub has, and is not here: branches, settings, discussions, ..."""
        hint = "docs/hub.md says what there is, and how an expert is pushed"
        if request.method not in READING:
            detail, allow = "nothing of the kind can be changed here", {"Allow": ", ".join(READING)}
            raise told(Problem(405, "read_only", detail, hint, allow), "read_only")
        if repo := request.path_params.get("repo"):
            self._listing(request)
            raise hub_problem(404, "not_found", "not_found", f"{NAMESPACE}/{repo} has nothing of the kind", hint)
        raise hub_problem(404, "not_found", "not_found", "there is nothing of the kind here", hint)

    def _listing(self, request: Request) -> Listing:
        repo: str = request.path_params["repo"]
        try:
            return self.repos.snapshot(repo, request.path_params.get("revision", LIVE))
        except Problem as problem:
            if problem.headers.get("X-Error-Code") == "RepoNotFound" and (found := self._pushed(repo)):
                return found
            raise


class _Revision(Convertor[str]):
    """A revision in an address, by its name alone or with what git puts before it."""

    regex = r"refs/[^/]+/[^/]+|[^/]+"

    def convert(self, value: str) -> str:
        return re.sub("^refs/(heads|tags)/", "", value)

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("revision", _Revision())


def reading_routes(published: Published, pushed: Callable[[str], Listing | None] = lambda _: None) -> list[Route]:
    """The addresses, for the end of a list: the last ones take what nothing else did."""
    api = HubReading(published, pushed)
    return [
        Route("/api/models", api.models),
        Route("/api/models/mainstem/{repo}", api.model),
        Route("/api/models/mainstem/{repo}/auth-check", api.access),
        Route("/api/models/mainstem/{repo}/revision/{revision:revision}", api.model),
        Route("/api/models/mainstem/{repo}/tree/{revision:revision}", api.tree),
        Route("/api/models/mainstem/{repo}/tree/{revision:revision}/{folder:path}", api.tree),
        Route("/api/models/mainstem/{repo}/paths-info/{revision:revision}", api.paths, methods=["POST"]),
        Route("/api/models/mainstem/{repo}/refs", api.refs),
        Route("/mainstem/{repo}/resolve/{revision:revision}/{name:path}", api.file),
        Route("/api/models/mainstem/{repo}/{rest:path}", api.missing, methods=METHODS),
        Route("/api/repos/{rest:path}", api.missing, methods=METHODS),
        Route("/api/models/{repo:path}", api.foreign),
        Route("/api/datasets/{repo:path}", api.foreign),
        Route("/api/spaces/{repo:path}", api.foreign),
        Route("/{repo:path}/resolve/{rest:path}", api.foreign),
    ]


def _headers(snapshot: Listing) -> dict[str, str]:
    return {**NO_CACHE, "X-Repo-Commit": snapshot.commit}


def _no_entry(snapshot: Listing, name: str) -> Problem:
    hint = f"GET /api/models/{NAMESPACE}/{snapshot.repo}/tree/{snapshot.commit} lists its files"
    problem = hub_problem(404, "EntryNotFound", "unknown_file", f"{NAMESPACE}/{snapshot.repo} has no {name!r}", hint)
    problem.headers = {**problem.headers, "X-Repo-Commit": snapshot.commit}  # clients note what is not there
    return problem


def _blob(entry: FileEntry) -> Row:
    """A file as git-lfs would have it: known by its sha256."""
    lfs = {"oid": entry.sha256, "sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
    return {"size": entry.size, "oid": entry.sha256[:40], "blobId": entry.sha256[:40], "lfs": lfs}


def _tree(snapshot: Listing, above: str, recursive: bool) -> Iterable[Row]:
    """What lies in a folder, with its folders before what is in them."""
    seen: set[str] = set()
    for name, entry in snapshot.files.items():
        if not name.startswith(above):
            continue
        parts = name[len(above) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            folder = above + "/".join(parts[:depth])
            if folder not in seen:
                seen.add(folder)
                yield {"type": "directory", "path": folder, "size": 0, "oid": snapshot.commit}
        if recursive or len(parts) == 1:
            yield {"type": "file", "path": name, **_blob(entry)}


def _paths(body: bytes, kind: str) -> list[str]:
    """The paths that are asked for. Problem 400."""
    try:
        if kind.startswith("application/json"):
            return [str(path) for path in json.loads(body)["paths"]]
        return parse_qs(body.decode(), strict_parsing=bool(body)).get("paths", [])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Problem(400, "bad_query", "that is no list of paths", 'as a form, or as {"paths": [...]}') from None


def _time(made: datetime | None) -> str | None:
    return made.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z" if made else None
