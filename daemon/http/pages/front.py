"""The first page: what goes on, what needs a person, what is live, and how it came to be."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import Response

from daemon.config import Settings
from daemon.home.attention import attention
from daemon.home.condition import Condition
from daemon.home.health import Trouble
from daemon.home.standing import Held, held
from daemon.http.files import Published
from daemon.http.pages.commands import commands, local_command
from daemon.http.pages.document import Origin, named, page
from daemon.http.pages.ground import facts
from daemon.http.pages.lineage import lineage
from daemon.http.pages.measured import measured
from daemon.http.pages.now import spoken
from daemon.http.pages.words import Said, said, set_params
from registry.records import Head, Score, Status, Version

ARRIVALS = 12  # rows shown
VERSIONS = 10  # rows shown
TASKS = 12  # scores shown of a head
QUEUE = 5  # entries shown
CARDS = 20  # heads shown


@dataclass(frozen=True, slots=True)
class ShownHead:
    """One head as the page shows it: `version` is the live one, `scores` are its, in the order of the tasks' names.

    unshown: how many more scores there are. held: the newest version, where that is not live.
    """

    head: Head
    version: Version | None
    params: str
    figures: Sequence[Said]
    scores: Sequence[tuple[str, Score]]
    unshown: int
    held: Held | None


def front(
    request: Request,
    published: Published,
    now: Condition,
    ours: Sequence[Trouble],
    settings: Callable[[], Settings] | None,
) -> Response:
    """The page. ours: what is wrong that only this process knows."""
    reader = published.reader
    heads = reader.heads()
    first = heads[0]
    known = {one.reason for one in now.troubles}
    now = replace(now, troubles=[*now.troubles, *(one for one in ours if one.reason not in known)])
    live = reader.version(first.name, first.live)
    origin = str(Origin.of(request))
    get = [*local_command(published, first), *(commands(published, first, live, origin) if live else ())]
    counts, open_cases = reader.counts(), reader.count_open()
    return page(
        request,
        published.home,
        "front.html",
        title=f"{first.name}/{first.live}",
        told=spoken(now, heads, counts, open_cases),
        condition=now,
        queue=[one for one in now.waiting or () if one.name != now.expert],
        most=QUEUE,
        incomplete=now.daemon.waiting if now.daemon else {},
        matters=attention(now, reader, published.home, named(published.home)),
        base=reader.base(),
        cards=[_card(published, head) for head in heads[:CARDS]],
        more_heads=len(heads) - len(heads[:CARDS]),
        first=first,
        counts={status: counts.get(status, 0) for status in Status},
        open=open_cases,
        arrivals=reader.experts(limit=ARRIVALS),
        lineage=lineage(published, heads, VERSIONS),
        measured=measured(reader, heads),
        facts=facts(published.home, reader, heads, now, settings),
        commands=get,
    )


def _card(published: Published, head: Head) -> ShownHead:
    reader = published.reader
    version = reader.version(head.name, head.live)
    evaluation = reader.evaluation(version.evaluation) if version and version.evaluation is not None else None
    scores = sorted(evaluation.scores.items()) if evaluation else []
    figures: Mapping[str, float] = version.figures if version else {}
    shown, unshown = scores[:TASKS], len(scores[TASKS:])
    return ShownHead(head, version, set_params(head), said(figures), shown, unshown, held(published.home, reader, head))
