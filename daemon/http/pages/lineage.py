"""The lineage: a row for each number of versions, what came or went with it, and how it is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from daemon.http.answers import Problem
from daemon.http.files import Published
from daemon.http.pages.graph import Graph, Link, Node, Row, drawn
from daemon.notation import called
from registry.reader import Reader
from registry.records import Deed, Expert, Head, Intervention, Version

LANES = 8  # heads in one picture
TURNS = 50  # interventions that are looked at for rollbacks
NAMED = 3  # experts that a row names as taken out


@dataclass(frozen=True, slots=True)
class Mark:
    """A word on a version of a head, in what colour, and why."""

    word: str
    tone: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One row: the versions with that number, of those heads that have one.

    expert: the one that came with them. what: what made them where none did. gone: the names of the experts that were
    taken out with them.
    """

    number: int
    versions: Sequence[tuple[Head, Version]]
    expert: Expert | None
    what: str
    gone: str
    marks: Sequence[Mark]
    drawn: Row


@dataclass(frozen=True, slots=True)
class Lineage:
    """The rows, newest first. older: the number to go on before; None where these are all. unshown: how many more heads
    there are.
    """

    heads: Sequence[Head]
    steps: Sequence[Step]
    graph: Graph
    older: int | None
    unshown: int


def lineage(published: Published, heads: Sequence[Head], rows: int, before: int | None = None) -> Lineage:
    """The newest `rows` of these heads, or those with a number below `before`."""
    reader, shown = published.reader, heads[:LANES]
    top = max((head.newest for head in shown), default=0) + 1
    limit = min(top, before) if before is not None else top
    found = {
        head.name: {one.number: one for one in reader.versions(head.name, limit=rows, before=limit)} for head in shown
    }
    numbers = sorted({number for versions in found.values() for number in versions}, reverse=True)[:rows]
    experts = reader.experts_of(one for versions in found.values() for one in versions.values())
    came = {
        number: experts.get(version.expert_id or 0)
        for versions in found.values()
        for number, version in versions.items()
        if version.expert_id
    }
    interventions = reader.interventions(limit=TURNS)
    graph = drawn(
        numbers,
        (
            Node(lane, n, _kind(head, one), one.parent, called(head.name, n))
            for lane, head in enumerate(shown)
            for n, one in found[head.name].items()
        ),
        [number for number in numbers if came.get(number)],
        [*_trained(shown, numbers, came), *_turns(shown, interventions)],
    )
    steps = [
        _step(published, [(head, found[head.name][n]) for head in shown if n in found[head.name]], came.get(n), graph)
        for n in numbers
    ]
    older = numbers[-1] if numbers and numbers[-1] > 0 else None
    return Lineage(shown, steps, graph, older, len(heads) - len(shown))


def _kind(head: Head, version: Version) -> str:
    if version.number == head.live:
        return "live"
    if version.held is not None:
        return "held"
    if version.number > head.live:
        return "back"
    if version.collected:
        return "gone"
    return "kept" if version.number else "base"


def _trained(heads: Sequence[Head], numbers: Sequence[int], came: Mapping[int, Expert | None]) -> list[Link]:
    lanes = {head.name: lane for lane, head in enumerate(heads)}
    return [
        Link(lanes[expert.trained_head], expert.trained_version or 0, number, "trained")
        for number in numbers
        if (expert := came.get(number)) and expert.trained_head in lanes
    ]


def _turns(heads: Sequence[Head], interventions: Sequence[Intervention]) -> list[Link]:
    """The newest rollbacks, each once."""
    lanes = {head.name: lane for lane, head in enumerate(heads)}
    found = {
        Link(lanes[one.head], one.previous, one.version, "turn"): None
        for one in interventions
        if one.deed is Deed.ROLLBACK and one.head in lanes and one.version is not None and one.previous is not None
        if one.previous > one.version
    }
    return list(found)


def _step(published: Published, versions: Sequence[tuple[Head, Version]], expert: Expert | None, graph: Graph) -> Step:
    head, first = versions[0]
    what, gone = "", ""
    if expert is None:
        gone = _gone(published, head, first)
        if not first.number:
            what = "the base"
        elif gone:
            what = "without"
        elif not first.totals.get("experts", 1):
            what = "the base again: no expert is left"
        else:
            what = "merged again by a rebuild"
    marks = [mark for one in versions for mark in _marks(*one, alone=len(versions) == 1)]
    return Step(first.number, versions, expert, what, gone, marks, graph.rows[first.number])


def _marks(head: Head, version: Version, *, alone: bool) -> list[Mark]:
    of = "" if alone else f"{head.name} "
    found = []
    if version.number == head.live:
        found.append(Mark(f"{of}live", "good"))
    elif version.held is not None:
        found.append(Mark(f"{of}held", "flag", version.held))
    elif version.number > head.live:
        found.append(Mark(f"{of}rolled back", "flag", head.frozen or ""))
    if version.pinned:
        found.append(Mark(f"{of}pinned", ""))
    return found


def _gone(published: Published, head: Head, version: Version) -> str:
    """The experts that a version no longer has, by name, as its manifest says it."""
    if version.collected or not version.number:
        return ""
    try:
        said = published.manifest(head, version).content.get("withdrawn")
        names = [str(one["name"]) for one in islice(said["experts"], NAMED)] if said else []
        more = len(said["experts"]) - len(names) if said else 0
    except (Problem, LookupError, TypeError):
        return ""  # readiness says what is damaged
    return ", ".join(names) + (f" and {more} more" if more else "")


def measures(reader: Reader, head: Head, points: int) -> Sequence[tuple[Version, Expert | None]]:
    """The newest versions of a head but the base, oldest first, each with its expert."""
    versions = [one for one in reader.versions(head.name, limit=points) if one.number][::-1]
    experts = reader.experts_of(versions)
    return [(one, experts.get(one.expert_id or 0)) for one in versions]
