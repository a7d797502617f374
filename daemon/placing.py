"""Moves an expert out of the inbox once its fate is in the registry; recovery finishes what a crash cut short.

Merged experts and duplicates go to archive/<id>/, refused ones to quarantine/<id>/ with a reason.json. The entry is
found by what it is (device, inode, time), not by its name: if it was replaced meanwhile, the newcomer stays.
"""

import json
import os

from daemon import durable
from daemon.failpoints import hit
from daemon.home import Home, number
from daemon.inbox import entry_id
from registry.records import Expert, Status
from registry.store import Store

REASON_FILE = "reason.json"


def place(home: Home, store: Store, expert: Expert) -> None:
    """Moves one expert to where its status says, and notes it in the registry."""
    refused = expert.status is Status.QUARANTINED
    folder = home.quarantine(expert.id) if refused else home.archive(expert.id)
    durable.make_folder(folder)
    if refused and not (folder / REASON_FILE).exists():
        durable.replace_file(folder / REASON_FILE, _reason(expert))
        hit("refuse.reason_written")
    hit("archive.before")
    for entry in os.scandir(home.inbox):
        if entry_id(entry.stat(follow_symlinks=False)) == expert.entry:
            # a drop that is itself called reason.json must not hide ours
            name = f"{entry.name}.dropped" if entry.name == REASON_FILE else entry.name
            durable.rename(home.inbox / entry.name, folder / name)
            break
    durable.sync_folder(folder.parent)
    hit("archive.after")
    store.placed(expert.id, f"{folder.parent.name}/{number(expert.id)}")


def place_all(home: Home, store: Store) -> None:
    """Finishes every move that a crash left undone."""
    for expert in store.unplaced():
        place(home, store, expert)


def _reason(expert: Expert) -> bytes:
    content = {
        "id": expert.id,
        "name": expert.name,
        "sha256": expert.sha256,
        "reason": expert.reason,
        "detail": expert.detail,
        "hint": expert.hint,
        "received_at": expert.received_at.isoformat(),
    }
    return json.dumps(content, indent=2).encode() + b"\n"
