"""The application: which address is answered by what. All answer GET and HEAD and change nothing, but for uploads."""

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from daemon.arrivals.uploads import Uploads
from daemon.config import Settings
from daemon.home.condition import DAMAGED, DOINGS, condition
from daemon.home.health import Health, Trouble
from daemon.http.answers import Problem, SecurityHeaders, of_registry
from daemon.http.events import Events
from daemon.http.forwarded import Forwarded
from daemon.http.hosts import HostCheck, Hosts
from daemon.http.hub import hub_routes
from daemon.http.measuring import Measured
from daemon.http.oci import oci_routes
from daemon.http.pages.routes import PageRoutes
from daemon.http.read_routes import ReadRoutes
from daemon.http.upload_routes import UploadRoutes
from daemon.layout import Home
from daemon.metrics import HeadMetrics
from registry.errors import RegistryError
from registry.reader import Reader

WRITING = ("PUT", "DELETE")


def create_app(
    home: Home,
    reader: Reader,
    metrics: CollectorRegistry,
    ready: Callable[[], str | None],
    uploads: Uploads | None = None,
    health: Health | None = None,
    hung: Callable[[], str | None] = lambda: None,
    *,
    beside: bool = False,
    counting: HeadMetrics | None = None,
    settings: Callable[[], Settings] | None = None,
) -> Starlette:
    """The application over one home. `ready` returns None once this process can do its part, else why it cannot.

    Without `uploads` everything is read only. `health`: where this process notes what is wrong. `hung`: why the loop
    that merges counts as hanging, None where it goes on. `beside`: merging is another process's part. `counting`: told
    of every request, and asks what is wrong; `metrics` is its registry. `settings`: those in force, for the page to
    show; their [http] says, now and for good, by which names it may be asked and whose X-Forwarded headers are
    believed. Without them any name will do, and nobody's are.
    """
    http = settings().http if settings else None
    noted = health or Health(home)

    def ours() -> list[Trouble]:
        """What only this process knows."""
        why_not = ready()
        found = [Trouble("not_ready", why_not, "the daemon's log says more")] if why_not else []
        if stuck := hung():
            found.append(Trouble("hung", stuck, "restart the daemon; nothing is lost"))
        if uploads and uploads.failing:
            found.append(Trouble("uploads", f"the last upload could not be stored: {uploads.failing}", "see the log"))
        return found

    def troubles() -> list[Trouble]:
        return ours() + noted.troubles(reader, beside=beside)

    def doing() -> tuple[str, Sequence[str]]:
        try:
            found = condition(home, reader)
        except OSError:  # of the disk: a scrape has much else to tell
            return DAMAGED, ["damaged", *(trouble.reason for trouble in ours())]
        return found.doing, [trouble.reason for trouble in (*ours(), *found.troubles)]

    api = ReadRoutes(home, reader, metrics, troubles, hung, uploads.came if uploads else lambda _: None)
    pages = PageRoutes(api.published, ours, settings)
    events = Events(lambda: pages.told().events)
    app = Starlette(
        routes=[
            *(_upload_routes(UploadRoutes(uploads, ready), api.expert) if uploads else ()),
            Route("/", pages.front),
            Route("/experts", pages.experts),
            Route("/experts/{id}", pages.expert),
            Route("/heads/{head}/versions/{n}", pages.version),
            Route("/lineage", pages.lineage),
            Route("/livez", api.livez),
            Route("/readyz", api.readyz),
            Route("/metrics", api.scrape),
            Route("/v1/heads", api.heads),
            Route("/v1/heads/{head}/latest", api.latest),
            Route("/v1/heads/{head}/latest/files/{name:path}", api.latest_file),
            Route("/v1/heads/{head}/versions", api.versions),
            Route("/v1/heads/{head}/versions/{n}", api.version),
            Route("/v1/heads/{head}/versions/{n}/data", api.data),
            Route("/v1/heads/{head}/versions/{n}/files/{name:path}", api.file),
            Route("/v1/heads/{head}/versions/{n}/views/{expert}/files/{name:path}", api.view),
            Route("/v1/experts", api.experts),
            Route("/v1/experts/{sha256}", api.expert),
            Route("/v1/lineage", api.lineage),
            Route("/v1/events", events.answer),
            *oci_routes(api.published),
            *hub_routes(api.published, uploads, ready),
        ],
        middleware=[
            Middleware(SecurityHeaders),
            *([Middleware(HostCheck, hosts=Hosts(http.host, http.allowed_hosts))] if http else ()),
            *([Middleware(Forwarded, proxies=http.trusted_proxies)] if http and http.trusted_proxies else ()),
        ],
        exception_handlers={
            Problem: _on_problem,
            HTTPException: _on_http_exception,
            RegistryError: _on_registry_error,
            Exception: _on_fault,
        },
    )
    if counting:
        counting.watch(DOINGS, doing)
        app.add_middleware(Measured, routes=app.routes, metrics=counting.http)  # becomes the outermost
    app.router.redirect_slashes = False  # it would build an absolute address from the Host header
    return app


def _upload_routes(api: UploadRoutes, read: Callable[[Request], Response]) -> list[Route]:
    """What changes something, and `read`, which has its address in common with it: Allow must name all methods."""

    async def expert(request: Request) -> Response:
        return await (api.expert(request) if request.method in WRITING else run_in_threadpool(read, request))

    return [
        Route("/v1/experts/{name}", expert, methods=["GET", *WRITING]),
        Route("/v1/experts/{name}/files/{file}", api.file, methods=["PUT"]),
        Route("/v1/experts/{name}/commit", api.commit, methods=["POST"]),
    ]


def _on_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, Problem)
    return error.response()


def _on_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason, hint = {
        404: ("not_found", "GET / shows the status and lists the addresses"),
        405: ("method_not_allowed", "this is read with GET or HEAD; docs/http.md says what can be sent"),
    }.get(error.status_code, ("http", "check the request"))
    return Problem(error.status_code, reason, error.detail, hint).response(error.headers)


def _on_registry_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RegistryError)
    return of_registry(error).response()


def _on_fault(_: Request, __: Exception) -> Response:
    return Problem(500, "fault", "the server failed", "the server's log has the traceback").response(
        {"Connection": "close"}
    )
