"""Experts as they are told apart in a message, where one word names several."""

from collections.abc import Sequence

from projector.text import shown
from registry.records import Expert

MOST_NAMED = 5


def told_apart(experts: Sequence[Expert]) -> str:
    """The id, sha256 and name of each, and how many more there are."""
    named = [f"{one.id} ({(one.sha256 or '-')[:12]} {shown(one.name)})" for one in experts[:MOST_NAMED]]
    more = f" and {len(experts) - MOST_NAMED} more" if len(experts) > MOST_NAMED else ""
    return ", ".join(named) + more
