"""Removes old versions' files. Their rows stay, so that lineage and numbers live on; experts are never touched."""

import os
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from uuid import uuid4

from daemon import durable
from daemon.config import Retention
from daemon.home import Home
from registry.records import Head, Version
from registry.store import Store


def collect(home: Home, store: Store, settings: Retention) -> list[Version]:
    """Removes what retention no longer keeps and returns it.

    Kept: version 0, the live version, the newest `settings.versions`, and whatever was followed by another version less
    than the grace time ago: a reader may just have resolved `latest` to it.
    The row is marked first: a version whose files are going is no longer offered.
    """
    gone = [version for head in store.heads() for version in _expired(store, head, settings)]
    for version in gone:
        store.collected(version.head, version.number)
        remove_files(home, version)
    return gone


def remove_files(home: Home, version: Version) -> None:
    """Removes a collected version's folders; no error where they are gone already.

    What is published goes at once, by a rename: nobody ever sees half of a version.
    """
    remove_whole(home, home.version(version.head, version.number))
    durable.remove(home.head_state(version.head, version.number))


def remove_whole(home: Home, path: Path) -> None:
    """Removes a file or folder at once, by a rename: no crash leaves a part of it where it was."""
    if os.path.lexists(path):
        going = home.tmp / uuid4().hex  # recovery empties that
        try:
            durable.rename(path, going)
        finally:  # a full disk may fail the sync, when it has moved already
            durable.remove(going)


def _expired(store: Store, head: Head, settings: Retention) -> list[Version]:
    oldest = datetime.now(UTC) - timedelta(seconds=settings.grace_seconds)
    newest_first = store.versions(head.name, include_collected=False)
    followed = list(pairwise(newest_first))[settings.versions - 1 :]
    return [
        version
        for successor, version in followed
        if version.number not in (0, head.live) and successor.created_at and successor.created_at < oldest
    ]
