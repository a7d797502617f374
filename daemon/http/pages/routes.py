"""The endpoints of the pages. Each answers in HTML, also where it cannot."""

from collections.abc import Callable, Sequence

from starlette.requests import Request
from starlette.responses import Response

from daemon.config import Settings
from daemon.home.condition import condition
from daemon.home.health import Trouble
from daemon.http.answers import Problem, of_registry
from daemon.http.files import Published
from daemon.http.pages import arrived, versions
from daemon.http.pages.document import page
from daemon.http.pages.front import front
from daemon.http.pages.now import Spoken, spoken
from registry.errors import RegistryError

Page = Callable[["PageRoutes", Request], Response]


def _in_html(answer: Page) -> Page:
    """That page; where it meets a problem, a page that says so."""

    def answered(self: "PageRoutes", request: Request) -> Response:
        try:
            return answer(self, request)
        except Problem as met:
            problem = met
        except RegistryError as error:
            problem = of_registry(error)
        return page(
            request,
            self._published.home,
            "problem.html",
            problem.status,
            title=str(problem),
            problem=problem,
            told=None,
        )

    return answered


class PageRoutes:
    """The pages of one home. They run in a worker thread, since they read the registry and the disk."""

    def __init__(
        self,
        published: Published,
        ours: Callable[[], Sequence[Trouble]],
        settings: Callable[[], Settings] | None = None,
    ) -> None:
        """ours: what is wrong that only this process knows."""
        self._published = published
        self._reader = published.reader
        self._ours = ours
        self._settings = settings

    def told(self) -> Spoken:
        """What goes on now."""
        now = condition(self._published.home, self._reader)
        return spoken(now, self._reader.heads(), self._reader.counts(), self._reader.count_open())

    @_in_html
    def front(self, request: Request) -> Response:
        now = condition(self._published.home, self._reader)
        return front(request, self._published, now, self._ours(), self._settings)

    @_in_html
    def lineage(self, request: Request) -> Response:
        return versions.whole_lineage(request, self._published, self.told)

    @_in_html
    def version(self, request: Request) -> Response:
        return versions.version(request, self._published, self.told)

    @_in_html
    def experts(self, request: Request) -> Response:
        return arrived.arrived(request, self._published, self.told)

    @_in_html
    def expert(self, request: Request) -> Response:
        return arrived.expert(request, self._published, self.told)
