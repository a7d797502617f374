"""A real daemon under measurement: fed, waited for, and asked what it spent. Sizes are bytes, times are seconds.

Experts are hard-linked beside the inbox and then renamed into it, so that each is whole at once and no bytes are
copied. Every home lies in a scratch folder on the checkpoints' own file system, and is gone afterwards.
"""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from urllib.request import urlopen

from daemon.arrivals.inbox import READY_MARKER
from daemon.demo.live import Live, daemon
from daemon.home.founding import found
from daemon.layout import Home
from projector.methods import make
from registry.reader import Reader

SETTINGS = "[retention]\nversions = 2\ngrace_seconds = 0\n"
"""Every arrival removes an old version, as it does in a daemon that has run for long; and the disk stays small."""
PATIENCE_SECONDS = 1800.0
LOOK_SECONDS = 0.005
"""Between two looks at a link on the disk, which cost the daemon nothing."""
ASK_SECONDS = 0.25
"""Between two questions over HTTP, which the daemon must answer beside its work."""
STEADY_SECONDS = 2.0
"""The gauge of what is prepared must read 1 for so long: at first it may still be that of the version before, and then
the file is being synced."""
PREPARED = 'mainstem_prepared_ratio{head="main"}'
MERGES = "mainstem_merge_seconds_count"
MERGING = "mainstem_merge_seconds_sum"
PHASE = re.compile(r'mainstem_merge_phase_seconds_total{phase="(\w+)"} (\S+)')


@dataclass(frozen=True)
class Commit:
    """One published version: when it was committed, and the seconds since its expert was taken."""

    number: int
    at: datetime
    seconds: float


@dataclass(frozen=True)
class Spent:
    """What a daemon has done so far: experts merged, seconds by phase summed over threads, seconds of merging."""

    merged: int
    phases: dict[str, float]
    merging: float
    peak: int


@dataclass(frozen=True)
class Daemon:
    """A running daemon and its home."""

    live: Live
    home: Home
    pid: int

    def wait_visible(self, version: int) -> None:
        """Returns once a consumer can see `version` of the head main, on the disk and over HTTP."""
        latest = self.home.latest("main")
        for _ in _polls(f"version {version}", LOOK_SECONDS):
            if int(latest.readlink().name) >= version:
                break
        with urlopen(f"{self.live.url}/v1/heads/main/versions/{version}", timeout=30) as answer:
            answer.read()

    def wait_merged(self, count: int) -> Spent:
        """Returns what it had spent when it was first seen with `count` experts merged, tidied up after and timed."""
        for _ in _polls(f"{count} experts", ASK_SECONDS):
            spent = self.spent()
            if spent.merged >= count:
                return spent
        raise AssertionError("unreachable")

    def wait_prepared(self) -> float:
        """Returns once all that the next arrival needs is ready: the seconds that took."""
        started = time.monotonic()
        since: float | None = None
        for _ in _polls("the preparation", ASK_SECONDS):
            now = time.monotonic()
            if _value(self.live.metric(PREPARED), PREPARED) != 1:
                since = None
            elif since is None:
                since = now
            elif now - since >= STEADY_SECONDS:
                return since - started
        raise AssertionError("unreachable")

    def spent(self) -> Spent:
        """What it has done so far, by its own metrics and the kernel's count of its memory."""
        lines = self.live.metric("mainstem_merge_")
        phases = {found[1]: float(found[2]) for line in lines if (found := PHASE.match(line))}
        return Spent(int(_value(lines, MERGES)), phases, _value(lines, MERGING), self.peak())

    def peak(self) -> int:
        """The highest resident size it has had."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found, "the kernel reports no VmHWM"
        return int(found[1]) * 1024

    def download(self) -> int:
        """Fetches the live version's files over HTTP, as a consumer would; returns how many bytes came."""
        folder = self.home.latest("main").resolve()
        total = 0
        for path in sorted(folder.glob("*.safetensors")):
            with urlopen(f"{self.live.url}/v1/heads/main/versions/{int(folder.name)}/files/{path.name}") as answer:
                while block := answer.read(1 << 20):
                    total += len(block)
        return total


def warm(checkpoints: Sequence[Path]) -> None:
    """Brings the weights into the page cache, so that whoever comes first does not pay for the disk."""
    for folder in checkpoints:
        for path in folder.glob("*.safetensors"):
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass


@contextmanager
def scratch(base: Path) -> Iterator[Path]:
    """A folder beside the checkpoints, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=base.resolve().parent, prefix="bench-") as folder:
        yield Path(folder)


def make_home(folder: Path, base: Path, method: str) -> Home:
    """A new home over `base` whose head main merges by `method`, with its default parameters."""
    home = Home(folder / "home")
    found(home, base, [("main", make(method))], lambda _: None)
    home.config.write_text(SETTINGS)
    return home


def drop(home: Home, expert: Path) -> None:
    """Puts a whole expert into the inbox at once, marked as complete, so that the daemon does not watch it settle."""
    beside = home.root / f"{expert.name}.part"
    shutil.copytree(expert, beside, copy_function=os.link)
    (beside / READY_MARKER).touch()
    beside.rename(home.inbox / expert.name)


@contextmanager
def running(home: Home) -> Iterator[Daemon]:
    """The daemon on that home, as a process of its own."""
    with daemon(home.root, port=0) as live:
        yield Daemon(live, home, _pid(home))


def commits(home: Home) -> list[Commit]:
    """Every version of the head main after the base, oldest first."""
    with Reader.open(home.registry) as reader:
        versions = reader.versions("main", newest_first=False)
    return [Commit(v.number, v.created_at, v.seconds) for v in versions if v.number and v.created_at and v.seconds]


@dataclass(frozen=True)
class Backlog:
    """A daemon that found all experts waiting: its commits, and what it had spent after each (some may be missed)."""

    commits: Sequence[Commit]
    seen: Sequence[Spent]
    peak: int

    def intervals(self) -> list[float]:
        """Seconds from one commit to the next, from the third expert on.

        The first is taken whole, so the interval to the second commit is the first that is merged like all others;
        it is left out as a warm-up.
        """
        times = [commit.at for commit in self.commits[1:]]
        return [(later - earlier).total_seconds() for earlier, later in pairwise(times)]

    def phases(self) -> dict[str, float]:
        """Seconds of each phase per expert, over all but the first that was seen."""
        first, last = self.seen[0], self.seen[-1]
        return per_expert(first, last)


def per_expert(before: Spent, after: Spent) -> dict[str, float]:
    """Seconds of each phase per expert between two moments."""
    count = after.merged - before.merged
    return {phase: (after.phases[phase] - before.phases.get(phase, 0.0)) / count for phase in after.phases}


def backlog(base: Path, experts: Sequence[Path], method: str) -> Backlog:
    """Starts a daemon on an inbox that holds every expert already, so that it never idles; ends when all are merged."""
    with scratch(base) as folder:
        home = make_home(folder, base, method)
        for expert in experts:
            drop(home, expert)
        seen: list[Spent] = []
        with running(home) as daemon:
            while not seen or seen[-1].merged < len(experts):
                seen.append(daemon.wait_merged(seen[-1].merged + 1 if seen else 1))
            daemon.download()
            peak = daemon.peak()
        return Backlog(commits(home), seen, peak)


def _value(lines: Sequence[str], name: str) -> float:
    """The value of one metric, labels included in its name, among scraped lines."""
    for line in lines:
        if line.startswith(f"{name} "):
            return float(line.removeprefix(name))
    raise SystemExit(f"the daemon has no metric {name}")


def _polls(what: str, pause: float) -> Iterator[None]:
    """Yields again and again, with a pause in between; gives up after PATIENCE_SECONDS."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)
    raise SystemExit(f"{what} did not appear within {PATIENCE_SECONDS:.0f} s")


def _pid(home: Home) -> int:
    """The child of this process that runs on that home."""
    for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
        if str(home.root).encode() in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError("the daemon is no child of this process")
