"""What the Hub's clients send: a repository is made, its files come, and a commit says what they are.

`mainstem/NAME` is an expert of that name; the write token is the Hub's token. Small files come within the commit,
others before it by the basic transfer of git-lfs: the client asks where to, and PUTs each to an address that is signed,
since it sends no token there. Xet is not spoken.
"""

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, urlencode
from uuid import uuid4

import anyio
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from daemon.arrivals.pushes import Push, check_expert, counts
from daemon.arrivals.receiving import Incoming, Stored
from daemon.arrivals.uploads import Uploads
from daemon.errors import NotUploaded, UploadsBusy
from daemon.http.answers import NO_CACHE, Problem, root_of
from daemon.http.hub.commit_body import read_commit
from daemon.http.hub.repos import LIVE, NAMESPACE, Listing, Repos, told
from daemon.http.upload_routes import Pieces, Stream, UploadRoutes, receive, short_body
from daemon.manifest import FileEntry

MOST_BYTES_IN_COMMIT = (
    256 << 20
)  # of one file: clients that would send larger ones by Xet alone send these all the same
SIGNED_SECONDS = 6 * 3600
SLOT_SECONDS = 3600.0  # how long a file waits for others, which may be large: the clients give up after a few tries
MOST_MADE = 1000  # repositories that are remembered before anything comes
LFS = "application/vnd.git-lfs+json"
NO_XET = "set HF_HUB_DISABLE_XET=1: this is no Xet storage"
BAD_TOKEN = (
    "Invalid credentials in Authorization header"  # by these words clients know that the repository may be there
)


class HubPushing(UploadRoutes):
    """The endpoints, all of which but one need the token."""

    def __init__(self, uploads: Uploads, ready: Callable[[], str | None], repos: Repos) -> None:
        super().__init__(uploads, ready)
        self._repos = repos
        self._made: dict[str, None] = {}

    def pushed(self, repo: str) -> Listing | None:
        """What has come of a repository that is being pushed, nothing of one that was just made."""
        push = self._uploads.pushed(repo) or (Push() if repo in self._made else None)
        if push is None:
            return None
        files = {path: FileEntry(path, one.size_bytes, one.sha256) for path, one in push.paths.items()}
        return Listing(repo, push.commit, files, None)

    async def whoami(self, request: Request) -> Response:
        return await self._guarded(request, self._whoami)

    async def create(self, request: Request) -> Response:
        return await self._guarded(request, self._create)

    async def validate(self, request: Request) -> Response:
        """Whether a model card is one: all are. Clients send no token here."""
        return await self._guarded(request, self._validate, anyone=True)

    async def preupload(self, request: Request) -> Response:
        """How each file is to be sent."""
        return await self._guarded(request, self._preupload)

    async def batch(self, request: Request) -> Response:
        """Where to."""
        return await self._guarded(request, self._batch)

    async def lfs_file(self, request: Request) -> Response:
        return await self._guarded(request, self._lfs_file)

    async def hub_commit(self, request: Request) -> Response:
        return await self._guarded(request, self._hub_commit)

    async def xet(self, _: Request) -> Response:
        raise self._told(Problem(404, "no_xet", "Xet is not spoken here", NO_XET))

    def _told(self, problem: Problem) -> Problem:
        if problem.status == 401:
            headers = {**problem.headers, "X-Error-Message": BAD_TOKEN}
            return Problem(401, problem.reason, str(problem), "the write token is the Hub's token: HF_TOKEN", headers)
        return told(problem, problem.reason)

    def _authorise(self, request: Request) -> None:
        if request.method != "PUT":
            super()._authorise(request)
            return
        query, token = request.query_params, self._uploads.token
        until, size = query.get("until", ""), query.get("size", "")
        signature = self._signature(request.path_params["repo"], request.path_params["oid"], size, until)
        good = hmac.compare_digest(query.get("signature", "").encode(), signature.encode())
        if token is None or not good or int(until) < time.time():
            raise Problem(401, "unauthorised", "this address is signed, and this is not it", "ask for it again")

    def _signature(self, repo: str, oid: str, size: str, until: str) -> str:
        text = f"{repo}\n{oid}\n{size}\n{until}"
        return hmac.new((self._uploads.token or "").encode(), text.encode(), hashlib.sha256).hexdigest()

    async def _whoami(self, _: Request) -> Response:
        access = {"type": "access_token", "accessToken": {"displayName": "write token", "role": "write"}}
        body = {"type": "user", "id": NAMESPACE, "name": NAMESPACE, "fullname": NAMESPACE, "orgs": [], "auth": access}
        return JSONResponse(body, headers=NO_CACHE)

    async def _create(self, request: Request) -> Response:
        asked = await self._json(request)
        if asked.get("type") not in (None, "model"):
            raise Problem(400, "not_a_model", "only models are pushed here", "leave the repository's type out")
        if asked.get("organization") not in (None, NAMESPACE):
            hint = f"push to {NAMESPACE}/NAME"
            raise Problem(403, "upload_name", f"there is no namespace but {NAMESPACE} here", hint)
        repo = await self._expert(str(asked.get("name", "")))
        self._made.pop(repo, None)
        self._made[repo] = None
        while len(self._made) > MOST_MADE:
            del self._made[next(iter(self._made))]
        address = f"{_origin(request)}/{NAMESPACE}/{repo}"
        return JSONResponse({"url": address, "name": f"{NAMESPACE}/{repo}", "id": repo}, headers=NO_CACHE)

    async def _validate(self, request: Request) -> Response:
        await self._json(request)
        return JSONResponse({"errors": [], "warnings": []}, headers=NO_CACHE)

    async def _preupload(self, request: Request) -> Response:
        repo = await self._target(request)
        rows = []
        for file in _rows(await self._json(request), "files"):
            path, size = str(file.get("path", "")), file.get("size")
            large = isinstance(size, int) and size > MOST_BYTES_IN_COMMIT
            mode = "lfs" if large else "regular"
            rows.append({"path": path, "uploadMode": mode, "shouldIgnore": not counts(path)})
        self._uploads.touch(repo)
        heavy = any(row["uploadMode"] == "lfs" for row in rows)
        what = (
            f"mainstem; files over {MOST_BYTES_IN_COMMIT >> 20} MiB come by git-lfs; where sending them fails, {NO_XET}"
        )
        return JSONResponse({"files": rows}, headers={**NO_CACHE, **({"X-HF-Warning": what} if heavy else {})})

    async def _batch(self, request: Request) -> Response:
        repo = await self._expert(request.path_params["repo"])
        asked = await self._json(request)
        if asked.get("operation") != "upload":
            raise Problem(400, "bad_list", "only uploads go by git-lfs here", "read it with huggingface_hub")
        until = str(int(time.time()) + SIGNED_SECONDS)
        objects, asked_for = [], set()
        for one in _rows(asked, "objects"):
            oid, size = str(one.get("oid", "")), one.get("size")
            if not re.fullmatch("[0-9a-f]{64}", oid) or not isinstance(size, int) or isinstance(size, bool) or size < 0:
                raise Problem(400, "bad_list", "that is no list of objects", "each has an oid, its sha256, and a size")
            row: dict[str, Any] = {"oid": oid, "size": size}
            if self._uploads.has(repo, oid) is None and oid not in asked_for:  # or it would come twice at once
                asked_for.add(oid)
                signed = {"size": size, "until": until, "signature": self._signature(repo, oid, str(size), until)}
                href = f"{_origin(request)}/{NAMESPACE}/{quote(repo)}.git/info/lfs/objects/{oid}?{urlencode(signed)}"
                row["actions"] = {"upload": {"href": href}}
            objects.append(row)
        self._uploads.touch(repo)
        body = {"transfer": "basic", "objects": objects, "hash_algo": "sha256"}
        return JSONResponse(body, headers=NO_CACHE, media_type=LFS)

    async def _lfs_file(self, request: Request) -> Response:
        repo = await self._expert(request.path_params["repo"])
        oid, size = request.path_params["oid"], int(request.query_params["size"])
        await self._take(repo, oid, size, Stream(request, self._uploads.stall_seconds), {oid})
        return JSONResponse({"oid": oid, "size": size}, headers=NO_CACHE)

    async def _hub_commit(self, request: Request) -> Response:
        repo = await self._target(request)
        came: list[str] = []

        async def take(content: Pieces) -> str:
            came.append(uuid4().hex)
            await self._take(repo, came[-1], None, content, set())
            return came[-1]

        try:
            commit = await read_commit(Stream(request, self._uploads.stall_seconds), take)
            added = {path: file for path, file in commit.added.items() if counts(path)}
            said = added, commit.removed, commit.summary, commit.parent
            push, entered = await run_in_threadpool(self._uploads.record, repo, *said)
        finally:
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self._uploads.forget, repo, came)
        self._made.pop(repo, None)
        quiet = push.quiet_seconds(self._uploads.quiet_seconds)
        self._log.info("pushed", drop=repo, commit=push.commit, files=len(push.paths), entered=entered)
        body = {
            "success": True,
            "commitOid": push.commit,
            "commitUrl": f"{_origin(request)}/{NAMESPACE}/{repo}/commit/{push.commit}",
            "hookOutput": "",
            "expert": repo,
            "in_inbox": entered,
            "waits_seconds": None if entered or not push.is_expert else quiet,
        }
        return JSONResponse(body, headers=NO_CACHE)

    async def _take(self, repo: str, file: str, size: int | None, content: Pieces, digests: set[str]) -> Stored:
        """A file that comes. Raises as `Uploads.begin` and `finish`; then nothing is left of it."""
        incoming = await self._begun(repo, file, size)
        try:
            await receive(content, incoming)
            return await run_in_threadpool(self._uploads.finish, incoming, digests)
        except BaseException as error:
            outcome = "refused" if isinstance(error, NotUploaded) else "broken"
            with anyio.CancelScope(shield=True):
                await run_in_threadpool(self._uploads.drop, incoming, outcome)
            raise

    async def _begun(self, repo: str, file: str, size: int | None) -> Incoming:
        end = time.monotonic() + SLOT_SECONDS
        while True:
            try:
                return await run_in_threadpool(lambda: self._uploads.begin(repo, file, size, pushed=True))
            except UploadsBusy:
                if time.monotonic() >= end:
                    raise
            await asyncio.sleep(0.2)

    async def _target(self, request: Request) -> str:
        """The expert that is pushed to. Problem 400."""
        if request.path_params["revision"] != LIVE or request.query_params.get("create_pr"):
            raise Problem(400, "bad_query", "an expert has no branches and no pull requests", f"push to {LIVE}")
        return await self._expert(request.path_params["repo"])

    async def _expert(self, repo: str) -> str:
        """The expert that a repository is. Problem 403 where it is read alone; NotUploaded where none is called so."""
        check_expert(repo)
        if await run_in_threadpool(self._repos.is_published, repo):
            hint = f"push to a name of the expert's own, for example {NAMESPACE}/legal-german"
            raise Problem(
                403, "upload_name", f"{NAMESPACE}/{repo} is what is published: it is merged, not pushed", hint
            )
        return repo

    async def _json(self, request: Request) -> dict[str, Any]:
        body = await short_body(Stream(request, self._uploads.stall_seconds))
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Problem(400, "bad_list", "that is no JSON object", "send what huggingface_hub sends")
        return found


def pushing_routes(api: HubPushing) -> list[Route]:
    """The addresses."""
    return [
        Route("/api/whoami-v2", api.whoami),
        Route("/api/repos/create", api.create, methods=["POST"]),
        Route("/api/validate-yaml", api.validate, methods=["POST"]),
        Route("/api/models/mainstem/{repo}/preupload/{revision}", api.preupload, methods=["POST"]),
        Route("/api/models/mainstem/{repo}/commit/{revision}", api.hub_commit, methods=["POST"]),
        Route("/api/models/mainstem/{repo}/xet-write-token/{revision}", api.xet),
        Route("/mainstem/{repo}.git/info/lfs/objects/batch", api.batch, methods=["POST"]),
        Route("/mainstem/{repo}.git/info/lfs/objects/{oid}", api.lfs_file, methods=["PUT"]),
    ]


def _rows(asked: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = asked.get(key)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise Problem(400, "bad_list", f"there is no list of {key}", "send what huggingface_hub sends")
    return found


def _origin(request: Request) -> str:
    """Where the client finds us: as it asked, or as the proxy says that it did."""
    return f"{request.url.scheme}://{request.headers.get('host', '')}{root_of(request)}"
