"""Pages about versions: the lineage, and one version with its files and the commands that fetch it."""

import re
from collections.abc import Callable, Mapping

from starlette.requests import Request
from starlette.responses import Response

from daemon.home.standing import Held, held
from daemon.http.answers import Problem
from daemon.http.files import Published
from daemon.http.pages.commands import commands
from daemon.http.pages.document import Origin, page
from daemon.http.pages.lineage import lineage
from daemon.http.pages.words import said, set_params
from daemon.layout import CARD
from daemon.manifest import Manifest
from daemon.notation import called
from registry.records import Head, Version

ROWS = 40  # of the lineage
FILES = 100  # of a version that are listed
CARD_BYTES = 64 << 10  # of the card that are shown
NUMBER = re.compile(r"[0-9]{1,12}")


def whole_lineage(request: Request, published: Published, told: Callable[[], object]) -> Response:
    """Every head's versions, ROWS at a time: `?before=` a number, `?head=` of one head. Problem 404."""
    heads = published.reader.heads()
    wanted = request.query_params.get("head")
    chosen = [published.head(wanted)] if wanted else heads
    before = request.query_params.get("before", "")
    found = lineage(published, chosen, ROWS, int(before) if NUMBER.fullmatch(before) else None)
    return page(
        request,
        published.home,
        "lineage.html",
        title=f"Lineage of {wanted}" if wanted else "Lineage",
        told=told(),
        lineage=found,
        heads=heads,
        wanted=wanted,
        before=before,
        base=published.reader.base(),
        first=heads[0],
    )


def version(request: Request, published: Published, told: Callable[[], object]) -> Response:
    """One version of one head. Problem 404."""
    reader = published.reader
    head = published.head(request.path_params["head"])
    text = request.path_params["n"]
    if not NUMBER.fullmatch(text):
        raise Problem(404, "unknown_version", "a version is a number", f"{called(head.name, head.live)} is live")
    row = published.row(head, int(text))
    manifest, wrong = _manifest(published, head, row)
    evaluation = reader.evaluation(row.evaluation) if row.evaluation is not None else None
    content: Mapping[str, object] = manifest.content if manifest else {}
    withdrawn = content.get("withdrawn")
    stays = held(published.home, reader, head)
    return page(
        request,
        published.home,
        "version.html",
        title=called(head.name, row.number),
        told=told(),
        head=head,
        version=row,
        params=set_params(head),
        figures=said(row.figures),
        expert=reader.expert(row.expert_id) if row.expert_id is not None else None,
        base=reader.base(),
        following=reader.version(head.name, row.number + 1),
        scores=sorted(evaluation.scores.items()) if evaluation else [],
        verdict=row.verdict or {},
        reasons=_reasons(row, stays if stays and stays.version == row.number else None),
        turn=_turn(head, row) if manifest else None,
        withdrawn=withdrawn if isinstance(withdrawn, dict) else None,
        content=content,
        manifest=manifest,
        files=list(manifest.files.values())[:FILES] if manifest else [],
        unlisted=max(0, len(manifest.files) - FILES) if manifest else 0,
        wrong=wrong,
        card=_card(published, head, row, manifest) if manifest else None,
        commands=commands(published, head, row, str(Origin.of(request))) if manifest else [],
        others=[one for one in reader.heads() if one.name != head.name][:20],
    )


def _reasons(row: Version, stays: Held | None) -> list[str]:
    """Why a version is not live: why it was held, and what keeps its head, which may say that as well."""
    why = stays.why if stays else None
    own = None if row.held and why and row.held in why else row.held
    return [one for one in (own, why) if one]


def _turn(head: Head, row: Version) -> str | None:
    """What makes a version live that is not; nothing where it is."""
    if row.number == head.live:
        return None
    return f"mainstem {'rollback' if row.number < head.live else 'promote'} {called(head.name, row.number)}"


def _manifest(published: Published, head: Head, row: Version) -> tuple[Manifest | None, Problem | None]:
    """The manifest, or why there is none."""
    if row.collected:
        return None, None
    try:
        return published.manifest(head, row), None
    except Problem as problem:
        return None, problem


def _card(published: Published, head: Head, row: Version, manifest: Manifest) -> str | None:
    """The text of its model card, as far as it is shown."""
    entry = manifest.files.get(CARD)
    if entry is None:
        return None
    try:
        return published.read(head, row, entry, CARD_BYTES).decode(errors="replace")
    except (Problem, OSError):
        return None
