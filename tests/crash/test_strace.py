"""The kernel itself fails an fsync, of the daemon or of SQLite: the daemon ends and says so, and nothing is lost."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemon.home import Home
from tests.crash.daemons import ROOT, SETTINGS
from tests.crash.worlds import MakeFolder, World, drain, outcome

CALLS = ("fsync", "fdatasync")
BEGUN = re.compile(r"(?P<thread>\d+) +(?P<name>\w+)\(\d+<(?P<path>.*?)>(?:\) += (?P<result>-?\d+)| <unfinished)")
ENDED = re.compile(r"(?P<thread>\d+) +<\.\.\. \w+ resumed>.*\) += (?P<result>-?\d+)")
SAMPLE = 3  # fsyncs that the default run lets fail
Nth = tuple[str, int]
"""A call of the main thread: which, and its number among those of its kind. strace counts for each thread alone."""


@dataclass
class Call:
    """One call that the report tells of."""

    thread: str
    name: str
    path: str
    failed: bool = False


def calls_in(report: Path) -> list[Call]:
    """What was synced, in its order."""
    found: list[Call] = []
    for line in report.read_text().splitlines():
        if begun := BEGUN.match(line):
            found.append(Call(begun["thread"], begun["name"], begun["path"], begun["result"] == "-1"))
        elif ended := ENDED.match(line):  # another thread's line came between
            call = next(call for call in reversed(found) if call.thread == ended["thread"])
            call.failed = ended["result"] == "-1"
    return found


def traced(home: Home, report: Path, *injection: str) -> subprocess.CompletedProcess[str]:
    """`python -m daemon run --once` under strace; `report` gets its fsyncs."""
    command = ["strace", "-f", "--seccomp-bpf", "-y", "-o", str(report), "-e", "trace=fsync,fdatasync", *injection]
    return subprocess.run(
        [*command, sys.executable, "-m", "daemon", *map(str, drain(home))],
        env=os.environ | SETTINGS | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def syncs(world: World, make_folder: MakeFolder) -> list[Nth]:
    """The fsyncs that an undisturbed run makes, in their order."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    root = make_folder("syncs")
    done = traced(world.home(root / "home"), root / "report")
    if "Operation not permitted" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    calls = calls_in(root / "report")
    seen = dict.fromkeys(CALLS, 0)
    found = []
    for call in calls:
        if call.thread == calls[0].thread:  # the one that flushes while others work does so by the clock
            seen[call.name] += 1
            found.append((call.name, seen[call.name]))
    return found


def fail_one(world: World, root: Path, which: Nth, expected: dict[str, object]) -> None:
    name, nth = which
    home, report = world.home(root / f"{name}-{nth}"), root / f"{name}-{nth}.report"
    ended = traced(home, report, "-e", f"inject={name}:error=EIO:when={nth}")
    calls = calls_in(report)
    failures = [place for place, call in enumerate(calls) if call.failed]  # a flush has its nth, too, if it goes on
    assert failures, "the call never came"
    failed, path = failures[0], calls[failures[0]].path
    folder = name == "fdatasync" and path == str(home.state)  # SQLite's own: it does not ask how that went
    if "registry.sqlite" not in path and not folder:  # a last checkpoint may fail too: the log holds it all
        assert ended.returncode == 1, (path, ended.stderr)
    if ended.returncode:
        assert '"hint"' in ended.stderr and "Traceback" not in ended.stderr, (path, ended.stderr)
        later = [call.path for call in calls[failed + 1 :] if "registry" not in call.path]
        assert path not in later, "it was retried"
    world.finish(home, {})
    assert outcome(home) == expected


def test_a_failing_fsync(world: World, syncs: list[Nth], expected: dict[str, object], tmp_path: Path) -> None:
    assert {name for name, _ in syncs} == set(CALLS)
    for share in range(1, SAMPLE + 1):
        fail_one(world, tmp_path, syncs[share * len(syncs) // (SAMPLE + 1)], expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fsync_failing_in_turn(
    world: World, syncs: list[Nth], expected: dict[str, object], tmp_path: Path
) -> None:
    for which in syncs:
        fail_one(world, tmp_path, which, expected)
