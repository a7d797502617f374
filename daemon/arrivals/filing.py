"""Moves an expert out of the inbox once its fate is in the registry; recovery finishes what a crash cut short.

Merged experts and duplicates go to archive/<id>/, and of duplicates what is there already goes (`duplicates`); refused
ones go to quarantine/<id>/ with a reason.json. The entry is found by what it is (device, inode, time), not by its name:
if it was replaced meanwhile, the newcomer stays. What cannot be moved (a folder of another owner, a mount point) stays
too: a merged one is copied into the archive, and each is tried again at the next start and when something about it
changes.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import structlog

from daemon.arrivals.copying import copy_entry
from daemon.arrivals.duplicates import spare
from daemon.arrivals.inbox import entry_id, fingerprint
from daemon.arrivals.stuck import stays_hint
from daemon.checkpoints.checkpoint import identity_at
from daemon.disk import durable
from daemon.disk.durable import Folder
from daemon.disk.failpoints import hit
from daemon.errors import NotYet
from daemon.layout import DROPPED_REASON_FILE, REASON_FILE, Home, number
from daemon.versions.retention import remove_whole
from projector.text import shown
from projector.watch import SILENT, Watch
from registry.records import Expert, Status
from registry.store import Store

IMMOVABLE = (errno.EACCES, errno.EPERM, errno.EBUSY, errno.EXDEV)


def place(home: Home, store: Store, expert: Expert, watch: Watch) -> bool:
    """Moves one expert to where its status says, and notes it in the registry; False where it cannot be moved, or
    where a merged one is gone: another folder may have taken the inbox's place, and the old one may come back.
    `watch` may put an end to it, and the next start goes on.
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
        target = folder / (DROPPED_REASON_FILE if path.name == REASON_FILE else path.name)
        try:
            _move(home, path, target)
        except FileNotFoundError:
            pass  # withdrawn just now
        except OSError as error:
            if error.errno not in IMMOVABLE or durable.failed_sync(error):
                raise
            if expert.status is Status.MERGED and not os.path.lexists(target):
                _copy(home, expert, path, target, watch)
            return False
    else:  # moved before a crash, but perhaps not yet durably
        durable.sync_folder(folder)
        durable.sync_folder(home.inbox)
    hit("archive.after")
    if expert.status is Status.MERGED and home.archived(expert.id) is None:
        return False
    if expert.status is Status.DUPLICATE:
        spare(home, store, expert, watch)
    note_place(store, expert)
    return True


def say_immovable(home: Home, expert: Expert) -> None:
    """Tells of an expert that `place` could not move."""
    structlog.get_logger().warning(
        "it cannot be moved out of the inbox",
        drop=shown(expert.name),
        id=expert.id,
        copied=home.archived(expert.id) is not None,
        hint=stays_hint(home, expert),
    )


def place_all(home: Home, store: Store, watch: Watch = SILENT) -> None:
    """Finishes every move that a crash left undone, and tells of what still cannot be moved."""
    for expert in store.unplaced():
        if not place(home, store, expert, watch):
            say_immovable(home, expert)


def _move(home: Home, path: Path, target: Path) -> None:
    """Moves an entry of the inbox to `target`. A copy that was made there when it could not be moved is kept: that is
    what was merged, whatever became of the entry since then, which goes.
    """
    if os.path.lexists(target):
        remove_whole(home, path)
    else:
        durable.rename(path, target)


def _copy(home: Home, expert: Expert, path: Path, target: Path, watch: Watch) -> None:
    """Copies an entry of the inbox that cannot be moved. Nothing is left where what was copied is not what was merged:
    it is still in the inbox. Raises OSError where the disk is full, or descriptors or memory are short.
    """
    making = home.tmp / uuid4().hex
    durable.make_folder(making)
    try:
        before = fingerprint(path)
        with Folder(home.inbox, follow=True) as inbox, Folder(making) as copies:
            copy_entry(inbox.fd, path.name, copies, watch)
        sidecars = sorted(expert.sidecars or {})
        if fingerprint(path) == before and identity_at(making / path.name, sidecars, watch) == expert.sha256:
            durable.rename(making / path.name, target)
        else:
            structlog.get_logger().error("it is not what was merged any more: no copy was made", drop=shown(path.name))
    except (NotYet, OSError) as error:
        if failed := durable.failed_sync(error):
            raise failed from None
        if isinstance(error, OSError) and (durable.is_full(error) or durable.is_short(error)):
            raise
        structlog.get_logger().error("it could not be copied into the archive", drop=shown(path.name), error=str(error))
    finally:
        durable.remove(making)


def note_place(store: Store, expert: Expert) -> None:
    """Notes that an expert has left the inbox: it was moved, or what lies there was mended and is another one now."""
    kept = "quarantine" if expert.status is Status.QUARANTINED else "archive"
    store.placed(expert.id, f"{kept}/{number(expert.id)}")


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
        "verdict": expert.verdict,
    }
    return json.dumps(content, indent=2).encode() + b"\n"
