"""What a version is called: HEAD/N, as main/12. All that is printed says it so; a number alone is every head's.

Others are understood too: a head for its live version, N of the first head, and N as v12 or as its folder is called.
And how experts are told apart.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from daemon.errors import DaemonError, Reason
from projector.text import listed

if TYPE_CHECKING:
    from registry.reader import Reader
    from registry.records import Expert, Version

LATEST = "latest"
_WORDS = re.compile(r"(?:(?P<head>[^\W\d]\w*)[/@:])?v?(?P<number>[0-9]{1,18}|latest)", re.ASCII)


class Named(NamedTuple):
    """A version that somebody named: of the first head where `head` is None, the live one where `number` is."""

    head: str | None
    number: int | None


def called(head: str, number: int) -> str:
    """The name of a version.

    >>> called("main", 12)
    'main/12'
    """
    return f"{head}/{number}"


def read_name(words: str, heads: Sequence[str] = ()) -> Named | None:
    """What `words` name, where they can name a version; a head of that name comes first.

    >>> read_name("main/12") == read_name("main@v12") == read_name("main/000012")
    True
    >>> read_name("v12")
    Named(head=None, number=12)
    >>> read_name("init", heads=["main", "init"])
    Named(head='init', number=None)
    """
    if words in heads:
        return Named(words, None)
    match = _WORDS.fullmatch(words)
    if match is None:
        return None
    return Named(match["head"], None if match["number"] == LATEST else int(match["number"]))


def find_version(reader: "Reader", words: str) -> "Version":
    """The version that is named so; also one whose files were collected. Raises DaemonError where there is none."""
    heads = {head.name: head for head in reader.heads()}
    first = next(iter(heads))
    named = read_name(words, list(heads))
    if named is None or (named.head or first) not in heads:
        raise DaemonError(
            Reason.UNKNOWN,
            f"{words!r} names no version",
            f"give a head ({', '.join(heads)}), HEAD/N as {called(first, heads[first].live)}, or N of {first}",
        )
    head = heads[named.head or first]
    number = head.live if named.number is None else named.number
    version = reader.version(head.name, number)
    if version is None:
        raise DaemonError(
            Reason.UNKNOWN,
            f"there is no version {called(head.name, number)}",
            f"the newest is {called(head.name, head.newest)}: see `mainstem status`",
        )
    return version


def told_apart(experts: Sequence["Expert"]) -> str:
    """The id, sha256 and name of each, where one word names several, and how many more there are."""
    return listed(f"{one.id} ({(one.sha256 or '-')[:12]} {one.name})" for one in experts)
