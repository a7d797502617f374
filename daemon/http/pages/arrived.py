"""Pages about experts: a list that can be searched, and one expert."""

import re
from collections.abc import Callable
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from daemon.home.attention import at_home
from daemon.home.standing import back
from daemon.http.answers import Problem
from daemon.http.files import Published
from daemon.http.pages.document import named, page
from daemon.notation import called
from registry.records import Expert, Status

ROWS = 50
LONGEST = 200  # letters of what is looked for
PLACES = 40  # heads that are named


def arrived(request: Request, published: Published, told: Callable[[], object]) -> Response:
    """The experts, newest first: pages by `?before=`, of one `?status=`. `?q=` looks for an id, a sha256, or a name
    that begins so, and says where it found more than it shows.
    """
    reader = published.reader
    words = request.query_params.get("q", "").strip()[:LONGEST]
    wanted = request.query_params.get("status", "")
    status = Status(wanted) if wanted in list(Status) else None
    before = _number(request.query_params.get("before", ""))
    found = reader.search(words, ROWS + 1) if words else reader.experts(status, ROWS + 1, before)
    shown = found[:ROWS]
    asked = {"status": str(status)} if status else {}
    return page(
        request,
        published.home,
        "experts.html",
        title="Experts",
        told=told(),
        q=words,
        status=status,
        statuses=list(Status),
        before=before,
        experts=shown,
        first=reader.heads()[0],
        more=len(found) > ROWS,
        older=urlencode({**asked, "before": shown[-1].id}) if len(found) > ROWS and not words else None,
        newest=urlencode(asked),
    )


def expert(request: Request, published: Published, told: Callable[[], object]) -> Response:
    """One expert by its id: what it is, what became of it, and where it went. Problem 404."""
    reader = published.reader
    number = _number(request.path_params["id"])
    one = reader.expert(number) if number else None
    if one is None:
        raise Problem(404, "unknown_expert", "there is no such expert", "the list of experts can be searched")
    heads = reader.heads()
    places = [
        (head, found)
        for head in heads[:PLACES]
        if one.version is not None and (found := reader.version(head.name, one.version))
    ]
    alone = reader.evaluation(one.evaluation) if one.evaluation is not None else None
    about = {name: value for name, value in (one.about or {}).items() if isinstance(value, str | int | float)}
    return page(
        request,
        published.home,
        "expert.html",
        title=one.name,
        told=told(),
        expert=one,
        about=about,
        rest=sorted(set(one.about or {}) - set(about)),
        places=places,
        scores=sorted(alone.scores.items()) if alone else [],
        start=one.trained_from,
        twin=reader.expert(one.duplicate_of) if one.duplicate_of else None,
        commands=[(what, at_home(command, named(published.home))) for what, command in _commands(one)],
        gone=called(heads[0].name, one.withdrawn_in) if one.withdrawn_in is not None else None,
    )


def _commands(one: Expert) -> list[tuple[str, str]]:
    """What a person can do about it."""
    if one.status is Status.QUARANTINED and one.closed_at is None:
        return [
            ("Put it back into the inbox, and close the case", " && ".join(back(one.id, blocked=one.blocked))),
            ("Remove it for good, and close the case", f"mainstem quarantine discard {one.id}"),
        ]
    if one.status is Status.MERGED:
        return [("Take it out of every head", f"mainstem rebuild --without {one.id}")]
    if one.blocked:
        return [("Let it in again, when it is dropped once more", f"mainstem unblock {one.id}")]
    return []


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,12}", text) else None
