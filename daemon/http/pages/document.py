"""A page as an answer: made of a template, under a policy that allows its own style and script and nothing else."""

import base64
import gzip
import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime

from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from daemon.checkpoints.hints import from_beside
from daemon.home.attention import at_home
from daemon.http.answers import NO_CACHE, root_of
from daemon.http.pages.words import human_ago, human_count
from daemon.layout import Home
from daemon.templating import asset, html_environment
from projector.text import duration, plain, size

REFRESH_SECONDS = 5  # where no script runs

STYLE, SCRIPT = asset("page.css", "pages.css"), asset("live.js")


def _digest(text: Markup) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_HEADERS = {
    **NO_CACHE,
    "Vary": "Accept-Encoding",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_digest(STYLE)}'; script-src 'sha256-{_digest(SCRIPT)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """By what address the visitor came: the Host header as it was sent, and what stands before our own addresses."""

    scheme: str
    host: str
    root: str

    @classmethod
    def of(cls, request: Request) -> "Origin":
        return cls(request.url.scheme, request.headers.get("host", ""), root_of(request))

    def __str__(self) -> str:
        """The address that ours begin with; without scheme and host where the header is not a plain host and port."""
        plain_host = re.fullmatch(r"[A-Za-z0-9.\-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", self.host)
        return f"{self.scheme}://{self.host}{self.root}" if plain_host else self.root


def up(request: Request) -> str:
    """What leads from a page to our first address. Relative, for a proxy may have put something before it and not have
    said so.
    """
    root = root_of(request)
    below = request.scope["raw_path"].decode("latin-1").removeprefix(root)
    return f"{root}/" if root else "../" * (below.count("/") - 1) or "./"


def named(home: Home) -> str:
    """What a page calls a home: its folder, which is also its path from the folder that it is in. Not the whole path:
    the page may be read by many, and where things lie on this machine is nobody's business.
    """
    return home.root.absolute().name


def page(request: Request, home: Home, template: str, code: int = 200, **values: object) -> Response:
    """The answer, packed where the visitor takes that."""
    html = _ENVIRONMENT.get_template(template).render(
        style=STYLE,
        script=SCRIPT,
        refresh=REFRESH_SECONDS,
        to=up(request),
        home=named(home),
        near=lambda text: from_beside(text or "", home),
        now=datetime.now(UTC),
        **values,
    )
    answer = HTMLResponse(html, code, headers=_HEADERS)
    if re.search(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?(?![.\d]))", request.headers.get("accept-encoding", "")):
        answer.body = gzip.compress(answer.body, compresslevel=5, mtime=0)
        answer.headers["Content-Length"] = str(len(answer.body))
        answer.headers["Content-Encoding"] = "gzip"
    return answer


_ENVIRONMENT = html_environment()
_ENVIRONMENT.filters |= {
    "bytes": size,
    "count": human_count,
    "ago": human_ago,
    "duration": duration,
    "plain": plain,
    "at_home": at_home,
}
