"""The lineage as it is drawn: what stands where, row by row, so that each row of the page draws its own part and may be
as high as its words need. Knows no HTML.

From left to right: columns for what goes back (rollbacks, versions that follow an older one), a lane for each head, the
place where experts come in, columns for the versions that experts were trained from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

STEP = 18  # from one column to the next, in pixels
Y = 20  # of what stands in a row, from its top
BEND = 8
MOST_COLUMNS = 4  # on either side; what finds no room is said in words alone
TOP, MIDDLE, BOTTOM = "0", str(Y), "100%"


@dataclass(frozen=True, slots=True)
class Node:
    """A version of a head. kind: base, live, kept, held, back (rolled back) or gone (collected). lane: counted from 0.

    parent: the number that it follows.
    """

    lane: int
    number: int
    kind: str
    parent: int | None
    called: str


@dataclass(frozen=True, slots=True)
class Link:
    """From the version `source` of a lane to the row `target`: "trained" of an expert, or "turn" of a rollback."""

    lane: int
    source: int
    target: int
    kind: str


@dataclass(frozen=True, slots=True)
class Stroke:
    """A vertical line in a row, between heights that SVG knows."""

    x: float
    top: str
    bottom: str
    kind: str


@dataclass
class Row:
    """What is drawn in one row. expert: where its expert comes in, None where none does."""

    nodes: list[tuple[float, Node]] = field(default_factory=list)
    strokes: list[Stroke] = field(default_factory=list)
    paths: list[tuple[str, str]] = field(default_factory=list)  # (what to draw, its kind)
    expert: float | None = None


@dataclass(frozen=True, slots=True)
class Graph:
    """The rows by number, each `width` pixels wide."""

    width: int
    rows: Mapping[int, Row]


def drawn(numbers: Sequence[int], nodes: Iterable[Node], experts: Iterable[int], links: Iterable[Link]) -> Graph:
    """Draws versions with these numbers, newest first; `experts`: those of them that an expert came with."""
    shown = {(node.lane, node.number): node for node in nodes if node.number in numbers}
    lanes = 1 + max((lane for lane, _ in shown), default=0)
    jumps = [
        Link(node.lane, node.number, node.parent, "jump")
        for node in shown.values()
        if node.parent is not None and node.parent != _below(numbers, node.number) and (node.lane, node.parent) in shown
    ]
    known = [
        one
        for one in links
        if (one.lane, one.source) in shown and one.target in numbers
        if (one.source > one.target) == (one.kind == "turn")  # nobody was trained from what came later
    ]
    left = _columns([*jumps, *(one for one in known if one.kind == "turn")])
    right = _columns([one for one in known if one.kind == "trained"])
    at = [STEP * (0.6 + 1 + max(left.values(), default=-1) + lane) for lane in range(lanes)]
    entry = at[-1] + STEP
    rows = {number: Row() for number in numbers}
    for (lane, number), node in shown.items():
        rows[number].nodes.append((at[lane], node))
        _to_parent(rows, numbers, node, at[lane], {(one.lane, one.source) for one in jumps})
    for number in experts:
        first = min((x for x, _ in rows[number].nodes), default=entry) if number in rows else entry
        if number in rows:
            rows[number].expert = entry
            rows[number].paths.append((f"M{entry:g} {Y}H{first:g}", "arrives"))
    for link, column in left.items():
        _back(rows, numbers, link, STEP * (0.6 + column), at[link.lane])
    for link, column in right.items():
        _forth(rows, numbers, link, entry + STEP * (0.8 + column), at[link.lane], entry)
    width = entry + STEP * (1 + max(right.values(), default=-1) + 0.5)
    return Graph(round(width), rows)


def _below(numbers: Sequence[int], number: int) -> int | None:
    return next((one for one in numbers if one < number), None)


def _to_parent(
    rows: Mapping[int, Row], numbers: Sequence[int], node: Node, x: float, jumping: set[tuple[int, int]]
) -> None:
    """The line down to the version that it follows, or out of the picture."""
    if node.parent is None or (node.lane, node.number) in jumping:
        return
    for number in numbers:
        if node.parent <= number <= node.number:
            top = MIDDLE if number == node.number else TOP
            bottom = MIDDLE if number == node.parent else BOTTOM
            rows[number].strokes.append(Stroke(x, top, bottom, f"lane lane-{node.lane % 6 + 1}"))


def _columns(links: Sequence[Link]) -> dict[Link, int]:
    """A column for each, so that no two in one column meet."""
    found: dict[Link, int] = {}
    for link in links:
        low, high = sorted((link.source, link.target))
        taken = {
            column
            for other, column in found.items()
            if not (high < min(other.source, other.target) or low > max(other.source, other.target))
        }
        free = next((column for column in range(MOST_COLUMNS) if column not in taken), None)
        if free is not None:
            found[link] = free
    return found


def _back(rows: Mapping[int, Row], numbers: Sequence[int], link: Link, column: float, x: float) -> None:
    """From a newer version down to an older one, on the left."""
    high, low = max(link.source, link.target), min(link.source, link.target)
    kind = f"{link.kind} lane-{link.lane % 6 + 1}"
    rows[high].paths.append((f"M{x:g} {Y}H{column + BEND:g}Q{column:g} {Y} {column:g} {Y + BEND}", kind))
    rows[high].strokes.append(Stroke(column, str(Y + BEND), BOTTOM, kind))
    for number in numbers:
        if low < number < high:
            rows[number].strokes.append(Stroke(column, TOP, BOTTOM, kind))
    rows[low].strokes.append(Stroke(column, TOP, str(Y - BEND), kind))
    end = x - 7 if link.kind == "turn" else x
    rows[low].paths.append((f"M{column:g} {Y - BEND}Q{column:g} {Y} {column + BEND:g} {Y}H{end:g}", kind))
    if link.kind == "turn":
        rows[low].paths.append((f"M{end - 4:g} {Y - 4}L{end:g} {Y}L{end - 4:g} {Y + 4}", kind))


def _forth(rows: Mapping[int, Row], numbers: Sequence[int], link: Link, column: float, x: float, entry: float) -> None:
    """From an older version up to the expert that was trained from it, on the right."""
    low, high, under = link.source, link.target, Y + 11
    rows[low].paths.append(
        (
            f"M{x:g} {Y}Q{x:g} {under} {x + BEND:g} {under}H{column - BEND:g}Q{column:g} {under} {column:g} {Y}",
            "trained",
        )
    )
    rows[low].strokes.append(Stroke(column, TOP, MIDDLE, "trained"))
    for number in numbers:
        if low < number < high:
            rows[number].strokes.append(Stroke(column, TOP, BOTTOM, "trained"))
    rows[high].strokes.append(Stroke(column, str(Y + BEND), BOTTOM, "trained"))
    rows[high].paths.append((f"M{column:g} {Y + BEND}Q{column:g} {Y} {column - BEND:g} {Y}H{entry + 5:g}", "trained"))
