"""The daemon dies, or its disk fails, at every named point; afterwards it is as if that had never happened."""

import os
import signal
from pathlib import Path

import pytest

from daemon.failpoints import POINTS
from daemon.home import Home
from tests.crash.worlds import FULL, World, drain, fill_inbox, outcome, settle, watch

FOUNDING_POINTS = (
    "file.create",
    "file.write",
    "file.sync",
    "folder.sync",
    "rename",
    "link.swap",
    "latest.half",
    "remove",
)
Trace = list[str]


@pytest.fixture(scope="session")
def trace(undisturbed: tuple[Home, Trace]) -> Trace:
    return undisturbed[1]


def passes(trace: Trace, point: str) -> list[int]:
    """Where in the trace the point is passed."""
    return [place for place, passed in enumerate(trace) if passed == point]


def merging(trace: Trace) -> range:
    """The part of the trace in which drops are taken: after recovery, and before the clean stop is noted."""
    stopping = ["remove", "file.create", "file.write", "file.sync", "rename", "folder.sync", "file.sync"]
    assert trace[-len(stopping) :] == stopping
    return range(trace.index("recover.end") + 1, len(trace) - len(stopping))


def inside(trace: Trace, point: str) -> list[int]:
    """The passes, counted from 1, while drops are taken; for a point of recovery, all."""
    numbered = list(enumerate(passes(trace, point), start=1))
    return [nth for nth, place in numbered if place in merging(trace)] or [nth for nth, _ in numbered]


def chosen(trace: Trace, point: str) -> list[int]:
    """Which passes the default run dies at: the first and the last while drops are taken. The long run takes all."""
    places = inside(trace, point)
    return sorted({places[0], places[-1]})


def test_ordinary_work_passes_every_point(trace: Trace) -> None:
    assert set(trace) == set(POINTS)


def test_founding_passes_the_points_of_the_disk(founding: Trace) -> None:
    assert set(founding) == set(FOUNDING_POINTS)


def killed(world: World, root: Path, point: str, nth: int, expected: dict[str, object]) -> None:
    home = world.home(root)
    ended = world.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"{point}=kill:{nth}")
    assert ended.code == -signal.SIGKILL, ended.log
    world.finish(home, {})
    assert outcome(home) == expected


@pytest.mark.parametrize("point", POINTS)
def test_killed(point: str, world: World, trace: Trace, expected: dict[str, object], tmp_path: Path) -> None:
    for nth in chosen(trace, point):
        killed(world, tmp_path / f"{nth}", point, nth, expected)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_pass(
    point: str, world: World, trace: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    for nth in range(1, len(passes(trace, point)) + 1):
        killed(world, tmp_path / f"{nth}", point, nth, expected)


@pytest.mark.parametrize("point", ["recover.swept", "rename", "folder.sync"])
def test_killed_while_recovering_from_a_kill(
    point: str, world: World, expected: dict[str, object], tmp_path: Path
) -> None:
    for first in ("publish.after", "commit.after", "refuse.recorded"):
        home = world.home(tmp_path / first)
        assert world.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"{first}=kill").code == -signal.SIGKILL
        assert world.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"{point}=kill").code == -signal.SIGKILL
        world.finish(home, {})
        assert outcome(home) == expected


@pytest.mark.parametrize("point", POINTS)
def test_a_failing_disk_ends_the_process(
    point: str, world: World, trace: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    home = world.home(tmp_path / "home")
    ended = world.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"{point}=eio:{inside(trace, point)[0]}")
    assert ended.code == 1
    message = "fsync failed" if point == "file.sync" else f"Input/output error (failpoint {point})"
    assert message in ended.log and "hint:" in ended.log and "Traceback" not in ended.log
    world.finish(home, {})
    assert outcome(home) == expected


@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_is_waited_for(
    point: str, world: World, trace: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    home, nth = world.home(tmp_path / "home"), chosen(trace, point)[-1]
    daemon = world.zygote.start(*watch(home), MAINSTEM_FAILPOINT=f"{point}=enospc:{nth}")
    ended = settle(home, daemon, len(world.drops))
    waits = passes(trace, point)[nth - 1] in merging(trace)
    assert (ended.code, FULL in ended.log) == ((0, True) if waits else (1, False)), ended.log
    assert not os.listdir(home.tmp) or not waits
    world.finish(home, {})
    assert outcome(home) == expected


def test_a_full_disk_ends_a_run_that_drains_once(world: World, expected: dict[str, object], tmp_path: Path) -> None:
    home = world.home(tmp_path / "home")
    ended = world.zygote.run(*drain(home), MAINSTEM_FAILPOINT="file.create=enospc:3")
    assert ended.code == 1 and "No space left" in ended.log and "hint:" in ended.log
    assert not os.listdir(home.tmp)
    world.finish(home, {})
    assert outcome(home) == expected


@pytest.mark.parametrize("point", ["fold.after", "rename", "commit.before", "commit.after", "archive.before"])
def test_an_unforeseen_error_ends_the_process(
    point: str, world: World, trace: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    home = world.home(tmp_path / "home")
    ended = world.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"{point}=raise:{inside(trace, point)[-1]}")
    assert ended.code == 1 and f"Injected: {point}" in ended.log
    world.finish(home, {})
    assert outcome(home) == expected


@pytest.mark.parametrize("point", FOUNDING_POINTS)
def test_killed_while_founding(
    point: str, world: World, founding: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    count = len(passes(founding, point))
    for nth in sorted({1, count}):
        home = Home(tmp_path / f"{nth}")
        ended = world.zygote.run(*world.init(home.root), MAINSTEM_FAILPOINT=f"{point}=kill:{nth}")
        assert ended.code == -signal.SIGKILL, ended.log
        if not home.exists():
            ended = world.zygote.run(*world.init(home.root))
            assert ended.code == 0, ended.log
        fill_inbox(home, world.drops)
        world.finish(home, {})
        assert outcome(home) == expected
