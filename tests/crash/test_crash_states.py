"""What a power failure may leave: only what was synced. A kill cannot show a missing fsync, this can.

`os.fsync` is the one call that makes anything durable here, so it is all that has to be watched: a file holds on the
disk what it held at its last fsync, a folder the names that it had at its own. SQLite syncs for itself and is believed:
what the registry's files hold counts as durable. At every moment that could matter the home is rebuilt from only that.
"""

import hashlib
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from daemon.arrivals import filing
from daemon.arrivals.inbox import entry_id
from daemon.config import load
from daemon.disk import durable
from daemon.home import recovery
from daemon.layout import Home
from daemon.merge import merger
from daemon.service import Service
from tests.crash.daemons import SETTINGS
from tests.crash.invariants import check
from tests.crash.worlds import World

SAMPLE = 6  # of how many states the default run checks one
Spared = Callable[[Path], bool]
State = dict[str, bytes | str | None]  # by path: a file's bytes, a link's target, None for a folder


class Disk:
    """What of one home is durable: of each file its bytes, of each folder its names."""

    def __init__(self, home: Home, spared: Spared) -> None:
        self._home = home
        self._spared = spared
        self._files: dict[int, bytes] = {}
        self._folders: dict[int, dict[str, int]] = {}
        self._links: dict[int, str] = {}
        self._pins: list[int] = []  # what was seen stays open, so that no inode number comes again
        self.states: dict[bytes, tuple[State, str]] = {}
        for folder, _, files in os.walk(home.root):
            for path in [Path(folder), *(Path(folder, name) for name in files)]:
                if not path.is_symlink():
                    self._keep(path)

    def synced(self, fd: int) -> None:
        """Takes note of an fsync, unless the path is one whose syncs are to be missing."""
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.is_relative_to(self._home.root) and not self._spared(path.relative_to(self._home.root)):
            self._keep(path)
            self.moment(f"fsync {path.relative_to(self._home.root)}")

    def moment(self, what: str) -> None:
        """Takes down what a power failure would leave now: without the unsynced names, and with them."""
        lost: State = {}
        self._walk(self._home.root.stat().st_ino, "", lost)
        kept: State = {}
        for folder, folders, files in os.walk(self._home.root):
            for name in [*folders, *files]:
                path = Path(folder, name)
                kept[str(path.relative_to(self._home.root))] = self._content(path)
        for state, names in ((lost, "lost"), (kept, "kept")):
            for name in ("state/registry.sqlite", "state/registry.sqlite-wal"):
                if (self._home.root / name).exists():
                    state[name] = (self._home.root / name).read_bytes()
            state.pop("state/registry.sqlite-shm", None)
            self.states.setdefault(digest(state), (state, f"{what}, unsynced names {names}"))

    def _content(self, path: Path) -> bytes | str | None:
        if path.is_symlink():
            return str(path.readlink())
        return None if path.is_dir() else self._files.get(path.stat().st_ino, b"")

    def close(self) -> None:
        for fd in self._pins:
            os.close(fd)

    def _keep(self, path: Path) -> None:
        status = self._pin(path)
        if not stat.S_ISDIR(status.st_mode):
            self._files[status.st_ino] = path.read_bytes()
            return
        names = self._folders[status.st_ino] = {}
        for child in path.iterdir():
            names[child.name] = self._pin(child).st_ino
            if child.is_dir() and not child.is_symlink():
                self._move(names[child.name], names)
            if child.is_symlink():
                self._links[names[child.name]] = str(child.readlink())
            elif child.is_dir():
                self._folders.setdefault(names[child.name], {})

    def _move(self, inode: int, here: dict[str, int]) -> None:
        """A folder is never in two places: once it is durably here, it is durably gone from where it was."""
        for names in self._folders.values():
            if names is not here:
                for name in [name for name, child in names.items() if child == inode]:
                    del names[name]

    def _pin(self, path: Path) -> os.stat_result:
        self._pins.append(os.open(path, os.O_PATH | os.O_NOFOLLOW))
        return os.fstat(self._pins[-1])

    def _walk(self, inode: int, prefix: str, found: State) -> None:
        for name, child in self._folders[inode].items():
            path = f"{prefix}{name}"
            if child in self._folders:
                found[path] = None
                self._walk(child, f"{path}/", found)
            else:
                found[path] = self._links[child] if child in self._links else self._files.get(child, b"")


def digest(state: State) -> bytes:
    """Tells states apart."""
    found = hashlib.sha256()
    for path, content in sorted(state.items()):
        found.update(f"{path}\0{type(content)}\0".encode())
        found.update(content.encode() if isinstance(content, str) else content or b"")
    return found.digest()


def entries(home: Home) -> dict[str, str]:
    """What lies in the inbox, by name, as the registry knows it."""
    return {path.name: entry_id(path) for path in home.inbox.iterdir()}


def rebuild(state: State, root: Path, before: dict[str, str]) -> Home:
    """The directory that a state describes. `before`: the inbox as it was, whose inodes cannot be had again."""
    root.mkdir()
    for name, content in sorted(state.items()):
        path = root / name
        if content is None:
            path.mkdir()
        elif isinstance(content, str):
            path.symlink_to(content)
        else:
            path.write_bytes(content)
    home = Home(root)
    with closing(sqlite3.connect(home.registry)) as registry, registry:
        for name, entry in entries(home).items():
            registry.execute("UPDATE experts SET entry = ? WHERE entry = ?", (entry, before[name]))
    return home


@contextmanager
def watched(disk: Disk, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tells the disk of every fsync and every failpoint."""
    fsync = os.fsync

    def synced(fd: int) -> None:
        fsync(fd)
        disk.synced(fd)

    with patch.context() as patching:
        patching.setattr(os, "fsync", synced)
        for module in (durable, merger, filing, recovery):
            patching.setattr(module, "hit", disk.moment)
        yield
    disk.close()


def states_of(world: World, root: Path, patch: pytest.MonkeyPatch, spared: Spared) -> Iterator[tuple[Home, str]]:
    """Every different state in which a power failure could leave a home while it merges, each made when asked for."""
    home = world.home(root / "home")
    disk, before = Disk(home, spared), entries(home)
    with patch.context() as patching:
        for name, value in SETTINGS.items():
            patching.setenv(name, value)
        settings = load(None)
    threads = torch.get_num_threads()
    try:
        with watched(disk, patch):
            Service(home, settings).run(once=True, http=False)
    finally:
        torch.set_num_threads(threads)
    for number, (state, moment) in enumerate(disk.states.values()):
        yield rebuild(state, root / f"{number}", before), moment
        shutil.rmtree(root / f"{number}")


def faults(
    world: World, root: Path, patch: pytest.MonkeyPatch, spared: Spared, every: int = 1
) -> Iterator[tuple[str, Exception]]:
    """The moments after which a power failure does harm that recovery cannot mend, looking at one in `every`."""
    seen = 0
    for home, moment in states_of(world, root, patch, spared):
        seen += 1
        if seen % every:
            continue
        try:
            check(home, world.dropped)
        except Exception as error:  # whatever it is, the home is not sound
            yield moment, error
    print(f"{seen} states, one in {every} checked")
    assert seen > 50


@pytest.mark.parametrize("every", [SAMPLE, pytest.param(1, marks=pytest.mark.slow)])
def test_a_power_failure_at_any_moment_loses_nothing(
    every: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(faults(world, tmp_path, monkeypatch, lambda path: False, every)) == []


def folder(*pattern: str) -> Spared:
    """Matches a path by the parts of it that are given; "*" stands for any part."""
    return lambda path: (
        len(path.parts) == len(pattern)
        and all(wanted in ("*", part) for wanted, part in zip(pattern, path.parts, strict=True))
    )


MISSING = {
    "weights": lambda path: path.name == "model.safetensors",
    "state": lambda path: path.name == "state.safetensors",
    "manifest": lambda path: path.name == "manifest.json",
    "companion": lambda path: path.name == "config.json",
    "the new version's folder": folder("state", "tmp", "*", "main", "published"),
    "the new state's folder": folder("state", "tmp", "*", "main", "state"),
    "published/main": folder("published", "main"),
    "state/heads/main": folder("state", "heads", "main"),
    "the reason of a refusal": lambda path: path.name.startswith(".reason.json"),
    "archive": folder("archive"),
    "one place in the archive": folder("archive", "*"),
    "quarantine": folder("quarantine"),
    "one place in the quarantine": folder("quarantine", "*"),
    "inbox": folder("inbox"),
}
IN_SHORT = ("weights", "published/main", "archive")  # the others only in the long run


@pytest.mark.parametrize(
    "missing",
    [
        pytest.param(spared, id=name, marks=[] if name in IN_SHORT else pytest.mark.slow)
        for name, spared in MISSING.items()
    ],
)
def test_without_one_of_the_fsyncs_something_is_lost(
    missing: Spared, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, error = next(faults(world, tmp_path, monkeypatch, missing))
    print(f"{moment}: {error}")
