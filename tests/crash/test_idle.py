"""The daemon dies while it prepares for the next expert: nothing is lost, and the next one comes to the same bits."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from daemon.disk.failpoints import IDLE_POINTS
from daemon.layout import Home
from tests.crash.daemons import LIMIT_SECONDS
from tests.crash.worlds import World, drain, outcome, watch
from tests.models import write_expert


@pytest.mark.parametrize("point", IDLE_POINTS)
def test_killed_while_preparing(point: str, world: World, expected: dict[str, object], tmp_path: Path) -> None:
    home = world.home(tmp_path / "home")
    ended = world.zygote.start(*watch(home), MAINSTEM_FAILPOINT=f"{point}=kill").wait()
    assert ended.code == -signal.SIGKILL, ended.log
    assert home.prepared("main", 3).exists() == (point == "prepared.after")
    world.finish(home, {})
    assert outcome(home) == expected
    without = Home(shutil.copytree(home.root, tmp_path / "without", symlinks=True))
    home_had_it = home.prepared("main", 3).exists()
    without.prepared("main", 3).unlink(missing_ok=True)
    assert home_had_it == (point == "prepared.after"), "what was finished is kept"
    for one in (home, without):
        write_expert(one.inbox / "next.safetensors", world.base, seed=9)
        ended = world.zygote.run(*drain(one))
        assert ended.code == 0, ended.log
    assert outcome(home) == outcome(without)


@pytest.mark.parametrize("point", IDLE_POINTS)
def test_a_failing_disk_while_preparing_ends_the_process(
    point: str, world: World, expected: dict[str, object], tmp_path: Path
) -> None:
    home = world.home(tmp_path / "home")
    ended = world.zygote.start(*watch(home), MAINSTEM_FAILPOINT=f"{point}=eio").wait()
    assert ended.code == 1 and f"Input/output error (failpoint {point})" in ended.log and "Traceback" not in ended.log
    world.finish(home, {})
    assert outcome(home) == expected


def test_a_full_disk_while_preparing_is_no_trouble(world: World, expected: dict[str, object], tmp_path: Path) -> None:
    home = world.home(tmp_path / "home")
    daemon = world.zygote.start(*watch(home), MAINSTEM_FAILPOINT="prepared.before=enospc")
    deadline = time.monotonic() + LIMIT_SECONDS
    while daemon.log.count('"merged"') < 3 or os.listdir(home.tmp):
        assert daemon.running and time.monotonic() < deadline, daemon.log
        time.sleep(0.05)
    time.sleep(1)  # it has given up by now
    assert daemon.running, daemon.log
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait().code == 0
    assert not home.prepared("main", 3).exists()
    world.finish(home, {})
    assert outcome(home) == expected
