"""The addresses of an OCI registry (distribution-spec 1.1), as far as they read.

What is refused is told in OCI's words; what fails on our side (500 and more) as everywhere else.
"""

import re
from collections.abc import Callable, Mapping
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from daemon.http.answers import NO_CACHE, SECURITY, Problem, immutable, precondition, root_of
from daemon.http.files import Published
from daemon.http.hub.repos import NAMESPACE
from daemon.http.oci.artifacts import CONFIG_TYPE, MANIFEST_TYPE
from daemon.http.oci.finding import LATEST, Artifacts
from daemon.http.sending import file_answer

READING = ("GET", "HEAD")
METHODS = (*READING, "POST", "PUT", "PATCH", "DELETE")
API = {"Docker-Distribution-Api-Version": "registry/2.0"}
UNKNOWN_NAME = "NAME_UNKNOWN"
UNKNOWN_MANIFEST = "MANIFEST_UNKNOWN"
UNKNOWN_BLOB = "BLOB_UNKNOWN"
UNSUPPORTED = "UNSUPPORTED"

_Answer = Callable[["OciReading", Request], Response]


class OciProblem(Problem):
    """One with OCI's `code`."""

    def __init__(self, code: str, problem: Problem) -> None:
        super().__init__(problem.status, problem.reason, str(problem), problem.hint, problem.headers)
        self.code = code

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        """As OCI's list of errors."""
        detail = {"reason": self.reason, "hint": self.hint}
        body = {"errors": [{"code": self.code, "message": str(self), "detail": detail}]}
        return JSONResponse(body, self.status, headers={**NO_CACHE, **SECURITY, **self.headers, **(headers or {})})


def refusing(code: str) -> Callable[[_Answer], _Answer]:
    """Makes an endpoint refuse in OCI's words: what is not there with `code`, another repository with NAME_UNKNOWN."""

    def of(answer: _Answer) -> _Answer:
        def in_their_words(self: "OciReading", request: Request) -> Response:
            try:
                return answer(self, request)
            except OciProblem:
                raise
            except Problem as problem:
                if problem.status >= 500:
                    raise
                if problem.status == 410:  # a registry knows no such answer
                    problem.status = 404
                unknown = UNKNOWN_NAME if problem.reason == "unknown_head" else code
                raise OciProblem(unknown if problem.status == 404 else UNSUPPORTED, problem) from None

        return in_their_words

    return of


class OciReading:
    """The endpoints, which run in a worker thread, since they read the registry and the disk."""

    def __init__(self, published: Published) -> None:
        self.published = published
        self.artifacts = Artifacts(published)

    def base(self, _: Request) -> Response:
        """That it is a registry."""
        return JSONResponse({}, headers={**NO_CACHE, **API})

    @refusing(UNKNOWN_NAME)
    def tags(self, request: Request) -> Response:
        repo: str = request.path_params["repo"]
        last, asked = request.query_params.get("last", ""), request.query_params.get("n")
        if asked is not None and not re.fullmatch(r"[0-9]{1,9}", asked):
            raise Problem(400, "bad_query", "n is no number", "for example ?n=100")
        every = [tag for tag in self.artifacts.tags(repo) if tag > last]
        page = every if asked is None else every[: int(asked)]
        headers = dict(NO_CACHE)
        if page and len(page) < len(every):
            query = urlencode({"n": len(page), "last": page[-1]})
            headers["Link"] = f'<{root_of(request)}/v2/{NAMESPACE}/{repo}/tags/list?{query}>; rel="next"'
        return JSONResponse({"name": f"{NAMESPACE}/{repo}", "tags": page}, headers=headers)

    @refusing(UNKNOWN_MANIFEST)
    def manifest(self, request: Request) -> Response:
        repo, reference = request.path_params["repo"], request.path_params["reference"]
        by_digest = ":" in reference
        found = (
            self.artifacts.with_sha256(repo, _sha256(reference))
            if by_digest
            else self.artifacts.tagged(repo, reference)
        )
        if found is None:
            raise _unknown("manifest", repo, reference)
        if not _accepts(request):
            hint = f"ask with Accept: {MANIFEST_TYPE}"
            raise Problem(404, "not_accepted", "it is an OCI image manifest, which is not accepted", hint)
        answer = _bytes(request, found.manifest, found.sha256, MANIFEST_TYPE)
        if not by_digest:
            answer.headers["Cache-Control"] = NO_CACHE["Cache-Control"]  # what a tag means may change
        return answer

    @refusing(UNKNOWN_BLOB)
    def blob(self, request: Request) -> Response:
        repo, digest = request.path_params["repo"], request.path_params["digest"]
        sha256 = _sha256(digest)
        found = self.artifacts.holding(repo, sha256)
        if found is None:
            raise _unknown("blob", repo, digest)
        row, artifact = found
        if sha256 == artifact.config_sha256:
            return _bytes(request, artifact.config, sha256, CONFIG_TYPE)
        entry = artifact.files[sha256]
        answer = file_answer(request, self.published.open(self.artifacts.head(repo), row, entry), entry)
        answer.headers["Docker-Content-Digest"] = digest
        return answer

    @refusing(UNKNOWN_NAME)
    def other(self, request: Request) -> Response:
        """Another repository, what would change something, and what we do not have."""
        if request.method not in READING:
            allow = {"Allow": ", ".join(READING)}
            problem = Problem(405, "read_only", "this registry is read only", "docs/oci.md says what it has", allow)
        elif re.fullmatch(r".+/(tags/list|(manifests|blobs)/[^/]+)", request.path_params["rest"]):
            hint = f"GET /v1/heads lists the heads: {NAMESPACE}/HEAD is one"
            raise Problem(404, "unknown_head", "there is no such repository here", hint)
        else:
            problem = Problem(404, "not_found", "this registry has no such address", "docs/oci.md says what it has")
        raise OciProblem(UNSUPPORTED, problem)


def oci_routes(published: Published) -> list[Route]:
    """The addresses."""
    api = OciReading(published)
    return [
        Route("/v2/", api.base),
        Route("/v2/mainstem/{repo}/tags/list", api.tags),
        Route("/v2/mainstem/{repo}/manifests/{reference}", api.manifest),
        Route("/v2/mainstem/{repo}/blobs/{digest}", api.blob),
        Route("/v2/{rest:path}", api.other, methods=METHODS),
    ]


def _bytes(request: Request, content: bytes, sha256: str, kind: str) -> Response:
    """Bytes that never change, as an answer."""
    digest = {"Docker-Content-Digest": f"sha256:{sha256}"}
    if unchanged := precondition(request.headers, sha256):
        unchanged.headers.update(digest)
        return unchanged
    headers = {**immutable(sha256), **digest, "Content-Type": kind, "Content-Length": str(len(content))}
    return Response(b"" if request.method == "HEAD" else content, headers=headers)


def _accepts(request: Request) -> bool:
    """Whether an OCI manifest may be the answer; without a word on it, it may."""
    kinds = [one.partition(";")[0].strip().lower() for one in ",".join(request.headers.getlist("accept")).split(",")]
    return kinds == [""] or not {MANIFEST_TYPE, "application/*", "*/*"}.isdisjoint(kinds)


def _sha256(digest: str) -> str:
    """Its hex digits. Problem 400 in OCI's words."""
    found = re.fullmatch(r"sha256:([0-9a-f]{64})", digest)
    if found is None:
        problem = Problem(400, "bad_digest", "that is no sha256 digest", "sha256: and 64 digits, in lower case")
        raise OciProblem("DIGEST_INVALID", problem)
    return found[1]


def _unknown(what: str, repo: str, digest: str) -> Problem:
    hint = f"retention may have removed it; {NAMESPACE}/{repo}:{LATEST} is the live version"
    return Problem(404, f"unknown_{what}", f"{NAMESPACE}/{repo} has no {what} {digest}", hint)
