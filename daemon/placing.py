"""Moves an expert out of the inbox once its fate is in the registry; recovery finishes what a crash cut short.

Merged experts and duplicates go to archive/<id>/, and of duplicates what is there already goes (`duplicates`); refused
ones go to quarantine/<id>/ with a reason.json. The entry is found by what it is (device, inode, time), not by its name:
if it was replaced meanwhile, the newcomer stays. What cannot be moved (a folder of another owner, a mount point) stays
too, and is tried again at the next start.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from daemon import durable
from daemon.duplicates import spare
from daemon.failpoints import hit
from daemon.home import Home, number
from daemon.inbox import entry_id
from projector.watch import SILENT, Watch
from registry.records import Expert, Status
from registry.store import Store

REASON_FILE = "reason.json"
IMMOVABLE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV)


def place(home: Home, store: Store, expert: Expert, watch: Watch = SILENT) -> bool:
    """Moves one expert to where its status says, and notes it in the registry; False where it cannot be moved, or
    where a merged one is gone: another folder may have taken the inbox's place, and the old one may come back.
    """
    if not home.inbox.is_dir():
        return False  # nor can it be said that it is not in there
    refused = expert.status is Status.QUARANTINED
    folder = home.quarantine(expert.id) if refused else home.archive(expert.id)
    durable.make_folder(folder)
    durable.sync_folder(folder.parent)  # first: what is moved into a folder could be lost together with its name
    if refused and not (folder / REASON_FILE).exists():
        durable.replace_file(folder / REASON_FILE, _reason(expert))
        hit("refuse.reason_written")
    hit("archive.before")
    if path := _find(home, expert):
        # a drop that is itself called reason.json must not hide ours
        name = f"{path.name}.dropped" if path.name == REASON_FILE else path.name
        try:
            durable.rename(path, folder / name)
        except FileNotFoundError:
            pass  # withdrawn just now
        except OSError as error:
            if error.errno not in IMMOVABLE or durable.failed_sync(error):
                raise
            return False
    else:  # moved before a crash, but perhaps not yet durably
        durable.sync_folder(folder)
        durable.sync_folder(home.inbox)
    hit("archive.after")
    if expert.status is Status.MERGED and home.archived(expert.id) is None:
        return False
    if expert.status is Status.DUPLICATE:
        spare(home, store, expert, watch)
    store.placed(expert.id, f"{folder.parent.name}/{number(expert.id)}")
    return True


def place_all(home: Home, store: Store, watch: Watch = SILENT) -> None:
    """Finishes every move that a crash left undone."""
    for expert in store.unplaced():
        place(home, store, expert, watch)


def _find(home: Home, expert: Expert) -> Path | None:
    for name in _names(home, expert):
        with suppress(OSError):  # an upload renamed or withdrawn just now, or an escaped name that is too long
            if entry_id(home.inbox / name) == expert.entry:
                return home.inbox / name
    return None


def _names(home: Home, expert: Expert) -> Iterator[str]:
    yield expert.name  # nearly always: to look through a full inbox for every expert takes quadratic time
    yield from os.listdir(home.inbox)


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
