"""Foreign names as they may stand in messages and logs. Knows no torch, so that everything may import it."""

from collections.abc import Iterable

EXPERT, BASE = "<expert>", "<base>"
FOLDER = "<folder>"  # the expert as a folder, which it may not have been dropped as
NEW = "<new>"  # a name in the inbox that is free
OUT = "<out>"  # what another program makes, in the current folder
"""What a hint calls paths that are not known where it is worded: see daemon/hints.py."""


def shown(name: str) -> str:
    """A tensor's or a file's name as it may stand in a message: printable, one line, at most 120 characters.

    >>> shown("layer.0.weight"), shown("a\\nb")
    ('layer.0.weight', 'a\\\\nb')
    """
    printable = name if name.isprintable() else ascii(name)[1:-1]
    return printable if len(printable) <= 120 else f"{printable[:117]}..."


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first few names of a list and how many more there are."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(shown(name) for name in all_names[:most]) + more
