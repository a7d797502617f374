"""SIGKILL at every step of `mainstem pull`: the destination is one whole version, and the next call finishes."""

import os
import signal
from pathlib import Path

import pytest

from daemon.layout import Home
from daemon.pull.pulling import pull
from tests.daemon.pulls import ended, forking, make_line, version_in

POINTS = ("file.create", "file.write", "file.sync", "folder.sync", "rename", "remove")
MOST = 60  # passes of one point in one pull


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_line(tmp_path_factory.mktemp("line"), versions=2)


def survived(origin: str, dest: Path, version: int, failpoint: str) -> bool:
    """Pulls in a fork that dies at the failpoint; True where it never got there."""

    def work() -> None:
        os.environ["MAINSTEM_FAILPOINT"] = failpoint
        pull(origin, dest, version=str(version))

    with forking(work) as child:
        status = ended(child)
    assert status in (0, -signal.SIGKILL)
    return status == 0


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("before", [None, 1], ids=["first", "later"])
def test_a_kill_at_any_step_leaves_one_whole_version(
    point: str, before: int | None, origin: str, tmp_path: Path
) -> None:
    found = set()
    for nth in range(1, MOST):
        dest = tmp_path / f"{nth}" / "model"
        if before is not None:
            pull(origin, dest, version=str(before))
        over = survived(origin, dest, 2, f"{point}=kill:{nth}")
        found.add(version_in(dest) if dest.exists() else None)
        assert found <= {before, 2}
        if over:
            break
        pull(origin, dest, version="2")
        assert version_in(dest) == 2
        assert os.listdir(dest.parent) == ["model"], "something was left beside it"
    else:
        pytest.fail(f"{point} is passed {MOST} times")
    assert nth > 1, f"{point} is never passed"
    assert 2 in found


@pytest.mark.parametrize("point", ["rename", "remove", "folder.sync"])
def test_a_kill_and_then_another_version(point: str, origin: str, tmp_path: Path) -> None:
    """What a killed pull left behind never gets into another version, nor into the same one after DEST was removed."""
    for nth in range(1, MOST):
        dest = tmp_path / f"{nth}" / "model"
        pull(origin, dest, version="1")
        over = survived(origin, dest, 2, f"{point}=kill:{nth}")
        pull(origin, dest, version="0")
        assert version_in(dest) == 0
        if over:
            break
        assert not survived(origin, dest, 2, f"{point}=kill:{nth}")
        dest.rename(dest.parent / "away")
        pull(origin, dest, version="2")
        assert version_in(dest) == 2
        assert sorted(os.listdir(dest.parent)) == ["away", "model"]
