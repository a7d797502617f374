"""The daemon dies, or its disk fails, at every named point; afterwards it is as if that had never happened."""

import os
import shutil
import signal
from pathlib import Path

import pytest

from daemon.disk.failpoints import POINTS
from daemon.layout import Home
from tests.crash.daemons import Ended, Running
from tests.crash.worlds import MakeFolder, World, drain, fill_inbox, outcome, settle, taken_in, watch

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
EXPERTS_OWN = (
    "fold.before",
    "fold.after",
    "read_out.after",
    "manifest.written",
)  # what goes wrong there may be the expert's doing
REST = 4  # drops that are left to a home whose first expert is merged
Trace = list[str]


@pytest.fixture(scope="session")
def trace(undisturbed: tuple[Home, Trace]) -> Trace:
    return undisturbed[1]


@pytest.fixture(scope="session")
def prepared(world: World, make_folder: MakeFolder) -> Home:
    """A home in the state that is normal: to be copied."""
    return world.prepared(make_folder("prepared") / "home")


@pytest.fixture(scope="session")
def daily(world: World, prepared: Home, make_folder: MakeFolder) -> Trace:
    """The failpoints that a daemon passes over such a home, from its start to the last drop's."""
    root = make_folder("daily")
    daemon, home = started(world, prepared, root / "home", trace=root / "trace")
    assert settle(home, daemon, REST).code == 0, daemon.log
    found = (root / "trace").read_text().split()
    return found[: last(found, "archive.after") + 1]


def started(
    world: World, prepared: Home, root: Path, trace: Path | None = None, **environment: str
) -> tuple[Running, Home]:
    """A daemon over a copy of the prepared home, with the rest of the drops in its inbox."""
    home = Home(shutil.copytree(prepared.root, root, symlinks=True))
    fill_inbox(home, world.drops[-REST:])
    return world.zygote.start(*watch(home), trace=trace, **environment), home


def last(trace: Trace, point: str) -> int:
    return max(passes(trace, point))


def passes(trace: Trace, point: str) -> list[int]:
    """Where in the trace the point is passed."""
    return [place for place, passed in enumerate(trace) if passed == point]


def inside(trace: Trace, point: str) -> list[int]:
    """The passes, counted from 1, while drops are taken; for a point of recovery, all."""
    numbered = list(enumerate(passes(trace, point), start=1))
    return [nth for nth, place in numbered if place > trace.index("recover.end")] or [nth for nth, _ in numbered]


def chosen(trace: Trace, point: str) -> list[int]:
    """Which passes the default run dies at: the first and the last while drops are taken. The long run takes all."""
    places = inside(trace, point)
    return sorted({places[0], places[-1]})


def test_ordinary_work_passes_every_point(trace: Trace, daily: Trace) -> None:
    assert set(trace) == set(POINTS) == set(daily)


def test_founding_passes_the_points_of_the_disk(founding: Trace) -> None:
    assert set(founding) == set(FOUNDING_POINTS)


def disturbed(world: World, prepared: Home, root: Path, failpoint: str, expected: dict[str, object]) -> Ended:
    """How a daemon ends that meets the failpoint; afterwards it is as if it never had."""
    daemon, home = started(world, prepared, root, MAINSTEM_FAILPOINT=failpoint)
    ended = settle(home, daemon, REST)
    if not ended.code:
        assert taken_in(ended.log) == REST, ended.log  # each is told of once
        assert not [path for path in home.tmp.iterdir() if not path.name.startswith("prepared-")]
    world.finish(home, {})
    assert outcome(home) == expected
    return ended


@pytest.mark.parametrize("point", POINTS)
def test_killed(
    point: str, world: World, prepared: Home, daily: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    for nth in chosen(daily, point):
        ended = disturbed(world, prepared, tmp_path / f"{nth}", f"{point}=kill:{nth}", expected)
        assert ended.code == -signal.SIGKILL, ended.log


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "eio", "enospc"])
@pytest.mark.parametrize("point", POINTS)
def test_at_every_pass(
    point: str, action: str, world: World, prepared: Home, daily: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    for nth in range(1, len(passes(daily, point)) + 1):
        ended = disturbed(world, prepared, tmp_path / f"{nth}", f"{point}={action}:{nth}", expected)
        assert ended.code in {"kill": (-signal.SIGKILL,), "eio": (1,), "enospc": (0, 1)}[action], ended.log


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_every_pass_while_it_drains_once(
    point: str, world: World, trace: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    for nth in range(1, len(passes(trace, point)) + 1):
        home = world.home(tmp_path / f"{nth}")
        ended = world.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"{point}=kill:{nth}")
        assert ended.code == -signal.SIGKILL, ended.log
        world.finish(home, {})
        assert outcome(home) == expected


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
    point: str, world: World, prepared: Home, daily: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    ended = disturbed(world, prepared, tmp_path / "home", f"{point}=eio:{inside(daily, point)[0]}", expected)
    assert ended.code == 1, ended.log
    message = "fsync failed" if point == "file.sync" else f"Input/output error (failpoint {point})"
    assert message in ended.log and '"hint"' in ended.log and "Traceback" not in ended.log


@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_is_waited_for(
    point: str, world: World, prepared: Home, daily: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    """Where something was prepared, its space may do; where nothing is, somebody else has to make room.

    The first pass of one point, the last of the next. The long run takes all.
    """
    nth = inside(daily, point)[-(POINTS.index(point) % 2)]
    ended = disturbed(world, prepared, tmp_path / "home", f"{point}=enospc:{nth}", expected)
    assert ended.code == 0, ended.log


@pytest.mark.parametrize("point", POINTS)
def test_an_unforeseen_error_ends_the_process_unless_it_may_be_the_experts(
    point: str, world: World, prepared: Home, daily: Trace, expected: dict[str, object], tmp_path: Path
) -> None:
    ended = disturbed(world, prepared, tmp_path / "home", f"{point}=raise:{inside(daily, point)[-1]}", expected)
    assert f"Injected: {point}" in ended.log
    assert ended.code == int(point not in EXPERTS_OWN), ended.log


def test_a_full_disk_ends_a_run_that_drains_once(world: World, expected: dict[str, object], tmp_path: Path) -> None:
    home = world.home(tmp_path / "home")
    ended = world.zygote.run(*drain(home), MAINSTEM_FAILPOINT="file.create=enospc:3")
    assert ended.code == 1 and "No space left" in ended.log and '"hint"' in ended.log
    assert not os.listdir(home.tmp)
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
