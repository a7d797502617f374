"""Removes old versions' files. Their rows stay, so that lineage and numbers live on; experts are never touched.

What is published of a version stays as the settings say, and longer where it is pinned or an expert was trained from
it. Only the newest state is ever folded onto. Some older ones stay, so that what came after them can be taken out at
once: the one before the newest, the live version's, and those of pinned versions. Heads that keep a record of each
expert keep all, since the views of a version are read from its state.

What there is to remove is found by the folders, which are few, and not by the rows, of which every version has one.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from daemon.disk import durable
from daemon.errors import BadHome
from daemon.layout import BY_ITSELF, STATE_FILE, Home
from registry.errors import BadRecord
from registry.reader import Reader
from registry.records import Head, Version
from registry.store import Store

if TYPE_CHECKING:
    from daemon.config import Retention

LEAST_GRACE_SECONDS = 60.0  # for whoever has just begun to read it, however little room there is
GRACE_SHARE = 10  # of what is free
CHOWN_HINT = "`chown -R` it to the user that the daemon runs as, then ask again"
OLDEST = 100  # versions of a head that are looked at together, where they are removed


def collect(
    home: Home, store: Store, settings: "Retention", goes_on: Callable[[], object] = lambda: None
) -> list[Version]:
    """Removes what retention no longer keeps and returns it.

    Kept: version 0, the live version, the newest `settings.versions`, what is pinned, what a merged expert was trained
    from, the version that was live before one that does not follow it, and whatever was followed by another version
    less than the grace time ago: a reader may just have resolved `latest` to it. A burst would fill the disk by that:
    what does not fit into `settings.grace_bytes` goes after LEAST_GRACE_SECONDS.
    The row is marked first: a version whose files are going is no longer offered. goes_on: is called before each, for
    hundreds take long; what it raises leaves the rest.
    """
    remove_old_states(home, store)
    gone: list[Version] = []
    fit = fitting(home, store, settings)
    for name in [head.name for head in store.heads()]:
        while (head := store.head(name)) and (found := expired(store, head, settings, fit, OLDEST)):
            before = len(gone)
            for version in found:
                goes_on()
                with suppress(BadRecord):  # somebody has just rolled back to it, or pinned it
                    store.collected(version.head, version.number)
                    remove_files(home, version)
                    gone.append(version)
            if len(gone) == before:
                break
    return gone


def remove_files(home: Home, version: Version) -> None:
    """Removes a collected version's folders; no error where they are gone already.

    What is published goes at once, by a rename: nobody ever sees half of a version.
    """
    remove_whole(home, home.version(version.head, version.number))
    for name in (version.head, BY_ITSELF):
        durable.remove(home.evaluation_log(name, version.number))
    durable.remove(home.head_state(version.head, version.number))


def remove_whole(home: Home, path: Path) -> None:
    """Removes a file or folder at once, by a rename: no crash leaves a part of it where it was.

    Raises PermissionError where something in it, as another user made it, may not be removed: what is left of it is
    then where it was, for in state/tmp every start would fail on it.
    """
    if os.path.lexists(path):
        going = home.tmp / uuid4().hex  # recovery empties that
        try:
            durable.rename(path, going)
        finally:  # a full disk may fail the sync, when it has moved already
            try:
                durable.remove(going)
            except PermissionError:
                durable.rename(going, path)
                raise


def remove_dropped(home: Home, path: Path) -> None:
    """As `remove_whole`, of what others made. Raises BadHome where it may not be removed."""
    try:
        remove_whole(home, path)
    except PermissionError as error:
        raise BadHome(f"{path} cannot be removed: {error.strerror}: {error.filename}", CHOWN_HINT) from error


def check_removable(folder: Path) -> None:
    """Raises BadHome where a folder in it, as another user dropped it, cannot be emptied by this one."""
    unread: list[OSError] = []
    walked = os.walk(folder, onerror=unread.append)
    closed = [path for path, _, _ in walked if not os.access(path, os.R_OK | os.W_OK | os.X_OK)]
    closed += [error.filename for error in unread if isinstance(error, PermissionError)]
    if closed:
        raise BadHome(f"{closed[0]} belongs to another user, and cannot be emptied", CHOWN_HINT)


def finish(home: Home, store: Store) -> None:
    """Removes what a crash left of collected versions, and of states that are no longer needed."""
    for head in store.heads():
        there = {*numbered(home.versions(head.name)), *numbered(home.states(head.name))}
        for version in (store.version(head.name, number) for number in sorted(there)):
            if version and version.collected:
                remove_files(home, version)
    remove_old_states(home, store)


def remove_old_states(home: Home, store: Store) -> None:
    """Removes the states that nothing will read. Call it once the newest version is committed: it is durable then."""
    for head in store.heads():
        for n, path in old_states(home, store, head):
            now = store.head(head.name)
            if now is None or n != now.live:  # somebody may just have rolled back to it
                durable.remove(path)


def old_states(home: Home, reader: Reader, head: Head) -> list[tuple[int, Path]]:
    """The states of a head that nothing will read, by the numbers of their versions."""
    found = []
    for number, path in numbered(home.states(head.name)).items():
        if number < head.newest - 1 and number != head.live and not needs_state(home, head, number):
            version = reader.version(head.name, number)
            if version is None or not version.pinned:
                found.append((number, path))
    return found


def needs_state(home: Home, head: Head, number: int) -> bool:
    """Whether the state of that version of a head must be there: of the newest, of all where there are views."""
    return number == head.newest or home.views(head.name).is_dir()


def numbered(folder: Path) -> dict[int, Path]:
    """The versions' folders in a folder by their numbers; nothing where it is not there."""
    return dict(_numbered(folder)) if folder.is_dir() else {}


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        if path.name.isascii() and path.name.isdecimal() and path.is_dir() and not path.is_symlink():
            yield int(path.name), path


def expired(reader: Reader, head: Head, settings: "Retention", fitting: int, limit: int = -1) -> list[Version]:
    """The versions that may go, the oldest first, `limit` of them at the most: within the grace time there may be
    thousands. fitting: how many may be kept for that alone.
    """
    now = datetime.now(UTC)
    before = now - timedelta(seconds=settings.grace_seconds)
    short = now - timedelta(seconds=min(settings.grace_seconds, LEAST_GRACE_SECONDS))
    first = _first_kept(reader, head, settings)
    found = [version for version in reader.unneeded(head, limit) if version.number < first]

    def over(version: Version) -> bool:
        return _followed_before(reader, version, before if version.number >= first - fitting else short)

    return list(takewhile(over, found))


def fitting(home: Home, reader: Reader, settings: "Retention") -> int:
    """How many versions of each head fit into what may be kept for the grace time alone.

    All heads have a version of each number, each about as large as their newest; where there are views, also a state.
    """
    each, kept = 0, 0
    for head in reader.heads():
        version = reader.version(head.name, head.newest)
        each += version.size_bytes if version else 0
        if home.views(head.name).is_dir():
            with suppress(OSError):
                each += (home.head_state(head.name, head.newest) / STATE_FILE).stat().st_size
        oldest = [version.number for version in reader.unneeded(head, 1)]
        kept = max([kept, *(_first_kept(reader, head, settings) - number for number in oldest)])
    each = max(1, each)
    room = settings.grace_bytes or (shutil.disk_usage(home.root).free + kept * each) // GRACE_SHARE
    return room // each


def _first_kept(reader: Reader, head: Head, settings: "Retention") -> int:
    """The oldest of the newest `settings.versions`."""
    return reader.versions(head.name, limit=settings.versions, include_collected=False)[-1].number


def _followed_before(reader: Reader, version: Version, moment: datetime) -> bool:
    successor = reader.version(version.head, version.number + 1)
    return bool(successor and successor.created_at and successor.created_at < moment)
