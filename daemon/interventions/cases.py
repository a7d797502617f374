"""Refused experts, which somebody has to look after: each goes back into the inbox, or out of the home.

What was refused is an open case until one of these was done, or another drop of the same name was merged.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome
from daemon.layout import DROPPED_REASON_FILE, REASON_FILE, Home, number
from daemon.versions.retention import check_removable, remove_dropped
from projector.text import shown
from registry.records import Deed, Expert, NewIntervention, Status
from registry.store import Store


def check(home: Home, experts: Sequence[Expert], deed: Deed) -> list[str]:
    """What the deed would do to each, in words. Raises BadHome where one is no open case, or cannot go back."""
    if deed is Deed.RETRY:
        given = [_given(path) for expert in experts for path in home.quarantined(expert.id)]
        if twice := {name for name in given if given.count(name) > 1}:
            raise BadHome(f"several of them are called {shown(min(twice))}", "retry them one after the other")
    return [_check(home, expert, deed) for expert in experts]


def close(home: Home, store: Store, expert: Expert, intervention: NewIntervention) -> None:
    """Puts what was refused back into the inbox, or removes it, and closes the case.

    The files go first. A crash between the two leaves an open case without files, of which both may be asked again.
    """
    if intervention.deed is Deed.RETRY:
        try:
            for path in home.quarantined(expert.id):
                durable.rename_new(path, home.inbox / _given(path))
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise BadHome(
                f"expert {expert.id} cannot be moved into the inbox: {error.strerror}",
                "see to the inbox, then ask again",
            ) from error
    hit("case.moved")
    remove_dropped(home, home.quarantine(expert.id))
    store.close_case(expert.id, intervention)


def _check(home: Home, expert: Expert, deed: Deed) -> str:
    which = f"expert {expert.id} ({shown(expert.name)})"
    there = home.quarantined(expert.id)
    if expert.status is not Status.QUARANTINED or (expert.closed_at and not there):
        why = "was looked after already" if expert.closed_at else f"is {expert.status}, not refused"
        raise BadHome(f"{which} {why}", "`mainstem quarantine list` lists the open cases")
    if expert.place is None:
        raise BadHome(f"{which} is still in the inbox", "try again once it has been moved")
    if deed is Deed.RETRY and expert.blocked:
        raise BadHome(f"{which} is blocked: it would not be merged", f"`mainstem unblock {expert.id}`, then ask again")
    if deed is Deed.DISCARD:
        check_removable(home.quarantine(expert.id))
        return f"{which}: what lies in quarantine/{number(expert.id)} is removed for good"
    moved = not there and os.path.lexists(home.inbox / expert.name)  # by somebody who died before it was noted
    if not there and not moved:
        raise BadHome(
            f"{which}: nothing is left of it in quarantine/{number(expert.id)}",
            f"drop it again; `mainstem quarantine discard {expert.id}` closes the case",
        )
    for path in there:
        if os.path.lexists(home.inbox / _given(path)):
            raise BadHome(f"{which}: the inbox has a {shown(_given(path))}", "try again once that has been taken")
    return f"{which} goes back into the inbox"


def _given(path: Path) -> str:
    """What it was called when it was dropped."""
    return REASON_FILE if path.name == DROPPED_REASON_FILE else path.name
