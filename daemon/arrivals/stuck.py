"""An expert whose fate is recorded and that cannot be moved out of the inbox: what to do. A module of its own
beside filing.py, since it loads no torch: `mainstem status` and `serve` ask it.
"""

import os

from daemon.layout import Home, number
from registry.records import Expert, Status


def stays_hint(home: Home, expert: Expert) -> str:
    """What to do about an expert whose fate is recorded, and which cannot be moved out of the inbox."""
    movable = "make it writable for the daemon (chmod a+w, or chown), and it is moved by itself"
    if expert.status is Status.QUARANTINED:
        return "mend it where it lies, which is noticed by itself, or remove it"
    if expert.status is Status.DUPLICATE:
        twin = home.archived(expert.duplicate_of) if expert.duplicate_of else None
        if twin and (twin.is_file() or any(twin.rglob("*.safetensors"))):
            return f"remove it: the archive has these weights; or {movable}"
        return f"do not remove it, the archive has these weights no more: {movable}"
    if home.archived(expert.id):
        return f"remove it: the archive has a copy; or {movable}"
    if not os.path.lexists(home.inbox / expert.name):
        return (
            "put the folder back that was the inbox when it was merged, or its file into"
            f" archive/{number(expert.id)}/ of the home; then restart the daemon"
        )
    return f"do not remove it, the archive has no copy yet: {movable}"
