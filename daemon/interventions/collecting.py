"""What retention no longer keeps, said and removed when somebody asks, and not only when the next expert arrives.

A dry run says what would go; how much room that makes is told by the files that have no other name.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from daemon.config import Retention
from daemon.home.presence import lock
from daemon.layout import Home
from daemon.notation import called
from daemon.versions.retention import collect, expired, fitting, old_states
from projector.text import size
from registry.reader import Reader
from registry.records import Version
from registry.store import Store


def planned(home: Home, reader: Reader, settings: Retention) -> list[str]:
    """What would be removed, in lines of words: each version and state with its size, and all together last."""
    lines, room, versions, states = [], 0, 0, 0
    fit = fitting(home, reader, settings)
    for head in reader.heads():
        going = {version.number: version for version in expired(reader, head, settings, fit)}
        spare = dict(old_states(home, reader, head))
        for number, version in going.items():
            state = home.head_state(head.name, number)
            spare.setdefault(number, state)
            lines.append(f"{called(head.name, number)}: {size(_of_version(home, version))}")
            room += _of_version(home, version)
        for number, path in sorted(spare.items()):
            if found := _size([path]):
                lines.append(f"{called(head.name, number)}: {size(found)} of state")
                room, states = room + found, states + 1
        versions += len(going)
    if lines:
        lines.append(f"{_count(versions, 'version')} and {_count(states, 'state')} in all, {size(room)}")
    return lines


def remove(home: Home, store: Store, settings: Retention, goes_on: Callable[[], object] = lambda: None) -> list[str]:
    """Removes it, and says what it was as `planned` does. goes_on: as `collect` has it."""
    lines = planned(home, store, settings)
    collect(home, store, settings, goes_on)
    return lines


def remove_alone(home: Home, settings: Retention) -> list[str]:
    """The same where no daemon runs. Raises BadHome where one has started meanwhile."""
    held = lock(home)
    try:
        with Store.open(home.registry) as store:
            return remove(home, store, settings)
    finally:
        os.close(held)


def _of_version(home: Home, version: Version) -> int:
    folder = home.version(version.head, version.number)
    return _size([folder, home.evaluation_log(version.head, version.number)])


def _size(paths: Sequence[Path]) -> int:
    """In bytes, of all files in these folders that have no other name."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    found = [file.lstat() for file in files if file.is_file() and not file.is_symlink()]
    return sum(status.st_size for status in found if status.st_nlink == 1)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
