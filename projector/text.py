"""Foreign names as they may stand in messages and logs. Knows no torch, so that everything may import it."""

from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

EXPERT, BASE = "<expert>", "<base>"
FOLDER = "<folder>"  # the expert as a folder, which it may not have been dropped as
NEW = "<new>"  # a name in the inbox that is free
OUT = "<out>"  # what another program makes, in the current folder
"""What a hint calls paths that are not known where it is worded: see daemon/checkpoints/hints.py."""


def shown(name: str, most: int = 120) -> str:
    """A tensor's or a file's name as it may stand in a message: printable, one line, at most `most` characters.

    >>> shown("layer.0.weight"), shown("a\\nb")
    ('layer.0.weight', 'a\\\\nb')
    """
    printable = name if name.isprintable() else ascii(name)[1:-1]
    return printable if len(printable) <= most else f"{printable[: most - 3]}..."


def plain(value: float, digits: int = 3) -> str:
    """A number as people write it, without an exponent between a millionth and a quadrillion.

    >>> plain(123.4, digits=2), plain(3000.0), plain(0.00012), plain(1.0), plain(1e30)
    ('120', '3000', '0.00012', '1', '1e+30')
    """
    rounded = f"{value:.{digits}g}"
    return format(Decimal(rounded), "f") if 1e-6 <= abs(value) < 1e15 else rounded


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names of a list and how many more there are."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(shown(name) for name in all_names[:most]) + more


def size(nbytes: int) -> str:
    """A number of bytes with a decimal unit.

    >>> size(350_000_000)
    '350.0 MB'
    """
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.95:  # what would be written 1000.0 is one of the next unit
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def duration(seconds: float) -> str:
    """How long.

    >>> duration(12), duration(300), duration(5760), duration(3 * 86400)
    ('12 s', '5 min', '1.6 h', '3 days')
    """
    if seconds < 90:
        return f"{max(0.0, seconds):.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{plain(seconds / 3600, 2)} h"
    return f"{seconds / 86400:.0f} days"


def once_each(twice: Callable[[], Exception]) -> Callable[[Sequence[tuple[str, Any]]], dict[str, Any]]:
    """For `json.loads(..., object_pairs_hook=)`: an object whose fields are each there once. Raises `twice()`."""

    def made(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise twice()
        return found

    return made
