"""What the crash tests merge: a small base, three experts, one refused drop and one duplicate, in a fixed order."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from daemon.layout import MANIFEST, STATE_FILE, Home
from registry.reader import Reader
from registry.records import Status
from tests.crash.daemons import LIMIT_SECONDS, Ended, Running, Zygote
from tests.crash.invariants import History, check, files_in, sha256
from tests.models import read_weights, write_base, write_expert

HEADS = ("--method", "opcm", "--head", "init=ema")
VERSIONS_KEPT = 2  # as daemons.SETTINGS says
FIRST_MTIME = 1_700_000_000
TAKEN = ("merged", "a duplicate: merged before", "refused")  # what the log says of a drop that is done
FULL = "the disk is full"

MakeFolder = Callable[[str], Path]  # conftest's fixture: a new folder that bears the name


class World:
    """A base, drops in their order, and a fresh home over them to be copied."""

    def __init__(self, root: Path, zygote: Zygote, heads: Sequence[str] = HEADS) -> None:
        self.zygote = zygote
        self._heads = heads
        self.base = write_base(root / "base", seed=0)
        (self.base / "1_Pooling").mkdir()  # a file in a folder of its own, and a license
        (self.base / "1_Pooling" / "config.json").write_text("{}\n")
        (self.base / "README.md").write_text("---\nlicense: mit\n---\n")
        self.drops = write_drops(root / "drops", self.base)
        self.dropped = [sha256(path) for path in self.drops]
        self._fresh = root / "fresh"
        assert zygote.run(*self.init(self._fresh)).code == 0

    def init(self, home: Path) -> list[str | Path]:
        """The arguments that found a home."""
        return ["init", home, "--base", self.base, *self._heads]

    def home(self, root: Path, *, fill: bool = True) -> Home:
        """A new home, with every drop in its inbox or none."""
        shutil.copytree(self._fresh, root, symlinks=True)
        if fill:
            fill_inbox(Home(root), self.drops)
        return Home(root)

    def prepared(self, root: Path) -> Home:
        """A home as it nearly always is: its first expert is merged, and the next one's work is prepared."""
        home = self.home(root, fill=False)
        fill_inbox(home, self.drops[:1])
        daemon = self.zygote.start(*watch(home))
        deadline = time.monotonic() + LIMIT_SECONDS
        while not home.prepared("main", 1).exists():
            assert daemon.running and time.monotonic() < deadline, daemon.log
            time.sleep(0.01)
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.wait().code == 0, daemon.log
        return home

    def finish(self, home: Home, history: History) -> None:
        """Recovers, runs until the inbox is drained, and asserts that all is as if nothing had ever gone wrong."""
        check(home, self.dropped, history)
        ended = self.zygote.run(*drain(home))
        assert ended.code == 0, ended.log
        assert home.clean.exists()
        assert not os.listdir(home.inbox)
        assert not home.in_hand.exists() and not home.attempts.exists()
        check(home, self.dropped, history, VERSIONS_KEPT)
        with Reader.open(home.registry) as reader:
            counts = {status: count for status, count in reader.counts().items() if count}
        assert counts == {Status.MERGED: 3, Status.DUPLICATE: 1, Status.QUARANTINED: 1}


def watch(home: Home) -> list[str | Path]:
    """The arguments that merge whatever comes, until it is stopped."""
    return ["run", "--no-http", "--home", home.root]


def drain(home: Home) -> list[str | Path]:
    """The arguments that merge all that is in the inbox."""
    return ["run", "--once", "--no-http", "--home", home.root]


def taken_in(log: str) -> int:
    """How many drops a daemon's log says are done."""
    return sum(f'"{event}"' in line for line in log.splitlines() for event in TAKEN)


def settle(home: Home, daemon: Running, drops: int) -> Ended:
    """Lets a daemon go on until it has taken so many drops, or has met a full disk and then taken all; stops it."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while daemon.running:
        taken = taken_in(daemon.log)
        if not os.listdir(home.inbox) and (taken >= drops or FULL in daemon.log):
            os.kill(daemon.pid, signal.SIGTERM)
            break
        assert time.monotonic() < deadline, daemon.log
        time.sleep(0.01)
    return daemon.wait()


def write_drops(root: Path, base: Path) -> list[Path]:
    """Experts as a file and as folders, one of them twice, and one with a NaN in its last tensor."""
    root.mkdir()
    first = write_expert(root / "a.safetensors", base, seed=1)
    second = write_expert(root / "b", base, seed=2)
    spoilt = read_weights(second)
    spoilt["layers.1.up.weight"][-1, -1] = torch.nan
    save_file(spoilt, root / "c.safetensors")
    shutil.copy(first, root / "d.safetensors")
    write_expert(root / "e", base, seed=3, scale=0.02)
    return sorted(root.iterdir())


def fill_inbox(home: Home, drops: Sequence[Path]) -> None:
    """Puts copies into the inbox, to be merged in this order."""
    for place, path in enumerate(drops):
        target = home.inbox / path.name
        if path.is_dir():
            shutil.copytree(path, target)
        else:
            shutil.copy(path, target)
        os.utime(target, (FIRST_MTIME + place, FIRST_MTIME + place))


def outcome(home: Home) -> dict[str, object]:
    """Weights, state, records and totals of every head's live version: what must not depend on what went wrong."""
    found: dict[str, object] = {}
    with Reader.open(home.registry) as reader:
        for head in reader.heads():
            version = reader.version(head.name, head.live)
            assert version
            folder = home.version(head.name, head.live)
            found[head.name] = [
                head.live,
                version.totals,
                sha256(home.head_state(head.name, head.live) / STATE_FILE),
                {path.name: sha256(path) for path in home.views(head.name).glob("*")},
                {
                    str(path): sha256(folder / path)
                    for path in files_in(folder)
                    if path.name != MANIFEST  # it holds the time
                },
            ]
    return found
