"""What lies in a home beyond its registry: what a crash of ours may leave, and what only an older registry explains.

A crash leaves the next version of each head at the most, whole and with a manifest that follows the newest one, and no
folder of an expert that has no row: rows come first. Anything else was there before the registry, which was then
restored from a backup, or a person put it there. It is never removed.
"""

import os
import re
from pathlib import Path

from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.restoring import again
from daemon.layout import MANIFEST, PREPARED_DIGEST, PREPARED_FILE, STATE_FILE, Home, number
from daemon.manifest import Manifest
from daemon.versions.latest import PLAIN, names_by_file, names_by_link
from daemon.versions.retention import remove_whole
from projector.text import listed
from registry.reader import Reader
from registry.records import Head

TEMPORARY = re.compile(r"(prepared-)?[0-9a-f]{32}")
IN_A_STATE = {STATE_FILE, PREPARED_FILE, PREPARED_DIGEST, f".{PREPARED_DIGEST}.tmp"}


def ahead(home: Home, reader: Reader) -> list[Path]:
    """What the registry should know and does not; sorted. Safe beside a daemon that is at work."""
    versions = {head.name: _Found(home, head.name) for head in reader.heads()}
    experts = {folder: _numbered(home.root / folder) for folder in ("archive", "quarantine")}
    last = reader.last_expert_id()  # asked last: what is committed meanwhile is known by then
    found = [path for paths in experts.values() for n, path in paths.items() if n > last and path.is_dir()]
    for head in reader.heads():
        if head.name in versions:
            found += versions[head.name].beyond(head, _newest_manifest(reader, head))
    return sorted(found)


def leftovers(home: Home, reader: Reader) -> list[Path]:
    """What a crash left of a version that was never committed. Only where nothing is `ahead`."""
    return [path for head in reader.heads() for path in _next(home, head) if path.exists()]


def refuse_ahead(home: Home, reader: Reader) -> None:
    """Raises BadHome where the registry is older than the rest of the home."""
    found = ahead(home, reader)
    if not found:
        return
    names = listed(str(path.relative_to(home.root)) for path in found)
    heads = reader.heads()
    ways = ["put back the state/registry.sqlite that they belong to"]
    if all(_stands(home, head) for head in heads):
        ways.append("move them out of the home: the next versions then take their numbers")
    else:
        ways.append(f"`{again(home)}`, which merges what this registry knows")
    raise BadHome(
        f"the registry is older than the rest of the home, or somebody put these there: {names}",
        f"{'; or '.join(ways)}; experts that it does not know lie in archive/ and can be dropped again"
        " (`mainstem verify` lists everything)",
    )


def _stands(home: Home, head: Head) -> bool:
    """Whether what the registry calls the newest can be gone on from, and what it calls live be read."""
    state = home.head_state(head.name, head.newest) / STATE_FILE
    there = all(home.version(head.name, n).exists() for n in (head.live, head.newest))
    return there and (head.newest == 0 or state.exists())


def temporaries(home: Home) -> list[Path]:
    """What was being made, or was on its way out, in state/tmp: nothing that has another name than we give."""
    return [path for path in home.tmp.iterdir() if TEMPORARY.fullmatch(path.name)]


def remove_temporary(path: Path) -> bool:
    """Removes one of these; False where another user's folder in it does not let us: it is in nobody's way."""
    try:
        durable.remove(path)
    except PermissionError:
        return False
    return True


def clear(home: Home, reader: Reader) -> list[Path]:
    """Removes what a crash, or a commit that failed, left of the next version, and returns it. Raises BadHome where
    something else has its place.
    """
    found = leftovers(home, reader)
    for head in reader.heads():
        version, state, _ = _next(home, head)
        follows = not version.exists() or _follows(version, head, _newest_manifest(reader, head))
        if not follows or (state.exists() and not _holds_a_state(state)):
            there = state if follows else version
            raise BadHome(f"{there} has the place of the next version", "move it out of the home, then start again")
    for path in found:
        remove_whole(home, path)
    return found


class _Found:
    """What lies in the folders of one head."""

    def __init__(self, home: Home, head: str) -> None:
        self._home = home
        self._named = {names_by_link(home.latest(head)), names_by_file(home.versions(head) / PLAIN)}
        self._versions = _numbered(home.versions(head))
        self._states = _numbered(home.states(head))
        self._records = _numbered(home.views(head), ".safetensors")

    def beyond(self, head: Head, newest_sha256: str | None) -> list[Path]:
        """What no crash leaves."""
        every = [(n, path) for paths in (self._versions, self._states, self._records) for n, path in paths.items()]
        found = [path for n, path in every if n > head.newest + 1 and (path.suffix or path.is_dir())]
        if version := self._versions.get(head.newest + 1):
            if number(head.newest + 1) in self._named:
                found.append(version)  # `latest` turns to a version once it is committed
            elif not _follows(version, head, newest_sha256):
                found.append(version)
        state = self._states.get(head.newest + 1)
        if state and state.is_dir() and not _holds_a_state(state):
            found.append(state)
        return found


def _next(home: Home, head: Head) -> tuple[Path, Path, Path]:
    """Where the next version of a head, its state and its record will be."""
    n = head.newest + 1
    return home.version(head.name, n), home.head_state(head.name, n), home.view_record(head.name, n)


def _holds_a_state(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} <= IN_A_STATE


def _follows(version: Path, head: Head, newest_sha256: str | None) -> bool:
    """True for a version that was made to be the next one of this head."""
    try:
        content = Manifest.read((version / MANIFEST).read_bytes()).content
        named = content["head"], content["version"], content["parent"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(named == (head.name, head.newest + 1, {"version": head.newest, "manifest_sha256": newest_sha256}))


def _newest_manifest(reader: Reader, head: Head) -> str | None:
    newest = reader.version(head.name, head.newest)
    return newest.manifest_sha256 if newest else None


def _numbered(folder: Path, suffix: str = "") -> dict[int, Path]:
    """What is called after a number as our folders (or, with a suffix, files) are; of what kind it is stays open."""
    if not folder.is_dir():
        return {}
    found = {name.removesuffix(suffix): folder / name for name in os.listdir(folder) if name.endswith(suffix)}
    ours = {name: path for name, path in found.items() if name.isascii() and name.isdecimal() and len(name) < 19}
    return {int(name): path for name, path in ours.items() if name == number(int(name))}
