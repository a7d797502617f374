"""Refused experts, which somebody has to look after: each goes back into the inbox, or out of the home.

What was refused is an open case until one of these was done, or another drop of the same name was merged.
"""

import os
from collections.abc import Sequence

from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome
from daemon.layout import REASON_FILE, Home, number
from daemon.versions.retention import remove_whole
from projector.text import shown
from registry.records import Deed, Expert, NewIntervention, Status
from registry.store import Store

DROPPED = f"{REASON_FILE}.dropped"  # a drop that was itself called so


def check(home: Home, experts: Sequence[Expert], deed: Deed) -> list[str]:
    """What the deed would do to each, in words. Raises BadHome where one is no open case, or cannot go back."""
    return [_check(home, expert, deed) for expert in experts]


def close(home: Home, store: Store, expert: Expert, intervention: NewIntervention) -> None:
    """Puts what was refused back into the inbox, or removes it, and closes the case.

    The files go first. A crash between the two leaves an open case without files, of which both may be asked again.
    """
    folder = home.quarantine(expert.id)
    if intervention.deed is Deed.RETRY:
        for name in _dropped(home, expert):
            durable.rename_new(folder / name, home.inbox / _given(name))
    hit("case.moved")
    remove_whole(home, folder)
    store.close_case(expert.id, intervention)


def _check(home: Home, expert: Expert, deed: Deed) -> str:
    which = f"expert {expert.id} ({shown(expert.name)})"
    if expert.status is not Status.QUARANTINED or expert.closed_at:
        why = "was looked after already" if expert.closed_at else f"is {expert.status}, not refused"
        raise BadHome(f"{which} {why}", "`mainstem quarantine list` lists the open cases")
    names = _dropped(home, expert)
    if deed is Deed.DISCARD:
        return f"{which}: what lies in quarantine/{number(expert.id)} is removed for good"
    moved = not names and os.path.lexists(home.inbox / expert.name)  # by somebody who died before it was noted
    if not names and not moved:
        raise BadHome(
            f"{which}: nothing is left of it in quarantine/{number(expert.id)}",
            f"drop it again; `mainstem quarantine discard {expert.id}` closes the case",
        )
    for name in names:
        if os.path.lexists(home.inbox / _given(name)):
            raise BadHome(f"{which}: the inbox has a {shown(_given(name))}", "try again once that has been taken")
    back = f"{which} goes back into the inbox"
    return f"{back}; `mainstem unblock {expert.id}` lets it be merged" if expert.blocked else back


def _dropped(home: Home, expert: Expert) -> list[str]:
    folder = home.quarantine(expert.id)
    return sorted(set(os.listdir(folder)) - {REASON_FILE}) if folder.is_dir() else []


def _given(name: str) -> str:
    return REASON_FILE if name == DROPPED else name
