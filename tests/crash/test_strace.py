"""The kernel itself fails an fsync, of the daemon or of SQLite: the daemon ends and says so, and nothing is lost."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.home import Home
from tests.crash.daemons import ROOT, SETTINGS
from tests.crash.worlds import World, drain, outcome

CALLS = re.compile(r"^\d+ +(?:fsync|fdatasync)\(\d+<(.*?)>\) += (-?\d+)", re.MULTILINE)
SAMPLE = 3  # fsyncs that the default run lets fail


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
def syncs(world: World, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many fsyncs an undisturbed run makes."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    root = tmp_path_factory.mktemp("syncs")
    done = traced(world.home(root / "home"), root / "report")
    if "Operation not permitted" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return len(CALLS.findall((root / "report").read_text()))


def fail_one(world: World, root: Path, nth: int, expected: dict[str, object]) -> None:
    home, report = world.home(root / f"{nth}"), root / f"{nth}.report"
    ended = traced(home, report, "-e", f"inject=fsync,fdatasync:error=EIO:when={nth}")
    calls = CALLS.findall(report.read_text())
    [failed] = [place for place, (_, result) in enumerate(calls) if result == "-1"]
    path = calls[failed][0]
    if "registry.sqlite" not in path:  # SQLite's last checkpoint may fail in silence: its log still holds everything
        assert ended.returncode == 1, (path, ended.stderr)
    if ended.returncode:
        assert '"hint"' in ended.stderr and "Traceback" not in ended.stderr, (path, ended.stderr)
        assert path not in [later for later, _ in calls[failed + 1 :] if "registry" not in later], "it was retried"
    world.finish(home, {})
    assert outcome(home) == expected


def test_a_failing_fsync(world: World, syncs: int, expected: dict[str, object], tmp_path: Path) -> None:
    for share in range(1, SAMPLE + 1):
        fail_one(world, tmp_path, share * syncs // (SAMPLE + 1), expected)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_fsync_failing_in_turn(world: World, syncs: int, expected: dict[str, object], tmp_path: Path) -> None:
    for nth in range(1, syncs + 1):
        fail_one(world, tmp_path, nth, expected)
