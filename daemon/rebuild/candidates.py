"""Experts as they are told apart in a message, where one word names several."""

from collections.abc import Sequence

from projector.text import listed
from registry.records import Expert


def told_apart(experts: Sequence[Expert]) -> str:
    """The id, sha256 and name of each, and how many more there are."""
    return listed(f"{one.id} ({(one.sha256 or '-')[:12]} {one.name})" for one in experts)
