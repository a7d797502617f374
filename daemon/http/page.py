"""The status page: one document without script and without a single outside request."""

import base64
import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.responses import HTMLResponse, Response

from daemon.home.health import Trouble
from daemon.home.standing import Held, held
from daemon.http.answers import NO_CACHE, Problem
from daemon.http.files import Published
from daemon.layout import is_adapter
from projector.text import size
from registry.records import Expert, Head, Score, Status, Version

ARRIVALS = 12  # rows shown
VERSIONS = 10  # rows shown
TASKS = 12  # scores shown of a head
CASES = 5  # rows shown
REFRESH_SECONDS = 5
PLAIN = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)  # names without a letter that a shell or curl takes as its own

_TEMPLATES = Path(__file__).parent.parent / "templates"
_STYLE = (_TEMPLATES / "status.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_HEADERS = {
    **NO_CACHE,
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
}


@dataclass(frozen=True, slots=True)
class ShownHead:
    """One head as the page shows it: `version` is the live one, `scores` are its, in the order of the tasks' names.

    unshown: how many more scores there are. held: the newest version, where that is not live.
    """

    head: Head
    version: Version | None
    params: str
    scores: Sequence[tuple[str, Score]]
    unshown: int
    held: Held | None


@dataclass(frozen=True, slots=True)
class LineageStep:
    """One version of the first head in the lineage, and the expert that made it (None: the base)."""

    version: Version
    expert: Expert | None


def _curl(address: str, names: Sequence[str]) -> str:
    """The command that fetches these files from below an address, each under its own name, folders and all."""
    if all(PLAIN.fullmatch(name) for name in names):
        listed = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        called = f"-o {names[0]}" if len(names) == 1 else "-o '#1'"
        return f"curl -fL --create-dirs {called} '{address}/{listed}'"
    pairs = " ".join(f"-o {shlex.quote(name)} '{address}/{quote(name)}'" for name in names)
    return f"curl -fL --create-dirs --globoff {pairs}"


@dataclass(frozen=True, slots=True)
class Origin:
    """By what address the visitor came: the Host header as it was sent, and what stands before our own addresses."""

    scheme: str
    host: str
    root: str

    def __str__(self) -> str:
        """The address that ours begin with; without scheme and host where the header is not a plain host and port."""
        plain = re.fullmatch(r"[A-Za-z0-9.\-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", self.host)
        return f"{self.scheme}://{self.host}{self.root}" if plain else self.root


def render(published: Published, troubles: Sequence[Trouble], origin: Origin, now: datetime) -> Response:
    """The page as of `now`. `troubles`: all that is wrong. `origin`: by what address the visitor came."""
    reader = published.reader
    heads = reader.heads()
    lineage = _lineage(published, heads[0])
    counts = reader.counts()
    html = _ENVIRONMENT.get_template("status.html").render(
        style=Markup(_STYLE),
        refresh=REFRESH_SECONDS,
        now=now,
        troubles=troubles,
        base=reader.base(),
        cards=[_card(published, head) for head in heads],
        first=heads[0],
        counts={status: counts.get(status, 0) for status in Status},
        arrivals=reader.experts(limit=ARRIVALS),
        open=reader.count_open(),
        cases=reader.quarantined(limit=CASES),
        lineage=lineage,
        commands=_commands(published, heads[0], str(origin)),
        root=origin.root,
    )
    return HTMLResponse(html, headers=_HEADERS)


def _card(published: Published, head: Head) -> ShownHead:
    short = {
        name: value for name, value in head.params.items() if not isinstance(value, list)
    }  # lists are in /v1/heads
    params = ", ".join(f"{name} {value}" for name, value in short.items())
    reader = published.reader
    version = reader.version(head.name, head.live)
    evaluation = reader.evaluation(version.evaluation) if version and version.evaluation is not None else None
    scores = sorted(evaluation.scores.items()) if evaluation else []
    return ShownHead(head, version, params, scores[:TASKS], len(scores[TASKS:]), held(reader, head))


def _lineage(published: Published, head: Head) -> Sequence[LineageStep]:
    reader = published.reader
    versions = reader.versions(head.name, limit=VERSIONS)
    return [
        LineageStep(version, reader.expert(version.expert_id) if version.expert_id is not None else None)
        for version in versions
    ]


def _commands(published: Published, head: Head, origin: str) -> Sequence[tuple[str, str]]:
    """What to copy to get the live version: (where it works, the command)."""
    try:
        manifest = published.manifest(head, published.version(head, head.live))
    except Problem:
        return []  # the page must come up on a damaged home too; readiness says what is wrong
    names = [name for name in manifest.files if not is_adapter(name)]
    address = f"{origin}/v1/heads/{quote(head.name, safe='')}/versions/{head.live}/files"
    commands = [("Download this version into the current folder", _curl(address, names))]
    home = published.home
    # Not the whole path: the page may be read by many, and where things lie on this machine is nobody's business.
    latest = str(home.latest(head.name).absolute().relative_to(home.root.absolute().parent))
    if "config.json" in manifest.files:
        where = "Load what is live on this machine, from the folder that the home is in"
        commands.insert(0, (where, f"AutoModel.from_pretrained({latest!r})"))
    return commands


def human_count(count: int) -> str:
    """22_713_216 -> "22.7 million"."""
    for unit, name in ((10**9, "billion"), (10**6, "million"), (10**3, "thousand")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return str(count)


def human_ago(moment: datetime, now: datetime) -> str:
    """How long ago: "just now", "5 min ago", "3 h ago", "2 days ago"."""
    seconds = (now - moment).total_seconds()
    if seconds < 10:
        return "just now"
    if seconds < 60:
        return f"{seconds:.0f} s ago"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    if seconds < 48 * 3600:
        return f"{seconds // 3600:.0f} h ago"
    return f"{seconds // 86400:.0f} days ago"


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"bytes": size, "count": human_count, "ago": human_ago}
