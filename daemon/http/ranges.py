"""Which bytes a Range header asks for (RFC 9110, 14.1 and 14.2). Knows no file and no answer."""

import re

MOST_RANGES = 100  # a request for more is answered with everything
GAP_BYTES = 160  # what is closer together than that costs less as one part than as two
_SPEC = re.compile(r"([0-9]*)-([0-9]*)", re.ASCII)
_ENDLESS = 10**18

Span = tuple[int, int]
"""The first byte, and the one after the last."""


class Malformed(ValueError):
    """The header is no list of ranges."""


class Unsatisfiable(ValueError):
    """None of the ranges begins within the content."""


def spans(header: str, size: int) -> list[Span] | None:
    """The parts of a content of `size` bytes that are asked for, in the order in which they were.

    None where the header is to be ignored: another unit than bytes, too many ranges, an empty content. Ranges that lie
    beyond the end are left out, those that overlap or nearly touch are joined, so that no more than `size` bytes are
    ever sent. Raises Malformed, or Unsatisfiable where nothing is left.

    >>> spans("bytes=0-9, -5", 1000)
    [(0, 10), (995, 1000)]
    """
    unit, _, listed = header.partition("=")
    if unit.strip().lower() != "bytes" or size == 0:
        return None
    specs = [spec.strip() for spec in listed.split(",") if spec.strip()]
    if not specs:
        raise Malformed(header)
    if len(specs) > MOST_RANGES:
        return None
    found: list[Span] = []
    for first, end in filter(None, [_span(spec, size) for spec in specs]):
        found = _joined(found, first, end)
    if not found:
        raise Unsatisfiable(header)
    return found


def _span(spec: str, size: int) -> Span | None:
    """One range; None where it lies beyond the end."""
    match = _SPEC.fullmatch(spec)
    if match is None or spec == "-":
        raise Malformed(spec)
    if not match[1]:
        return (max(0, size - _number(match[2])), size) if _number(match[2]) else None
    first, last = _number(match[1]), _number(match[2]) if match[2] else _ENDLESS
    if last < first:
        raise Malformed(spec)
    return (first, min(last + 1, size)) if first < size else None


def _number(digits: str) -> int:
    return int(digits) if len(digits) <= 18 else _ENDLESS


def _joined(found: list[Span], first: int, end: int) -> list[Span]:
    """The spans with one more, which takes the place of the first that it touches."""
    joined: list[Span] = []
    place = None
    for span in found:
        if span[0] <= end + GAP_BYTES and first <= span[1] + GAP_BYTES:
            first, end = min(first, span[0]), max(end, span[1])
            place = len(joined) if place is None else place
        else:
            joined.append(span)
    joined.insert(len(joined) if place is None else place, (first, end))
    return joined
