"""A disk of a few megabytes runs full wherever it does: nothing is lost, and with room the daemon goes on by itself."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from daemon.layout import Home
from tests.crash.daemons import Running
from tests.crash.invariants import check
from tests.crash.worlds import FULL, World, drain, fill_inbox, outcome, settle, watch
from tests.daemon.outbox.receiver import receiving

PLENTY = 64 << 20
PAGE = 4096
ENOUGH_PAGES = 660  # more than a whole run needs, with what the desk sets aside
PATIENCE_SECONDS = 30.0


class Disk:
    """A tmpfs whose size can be changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        self._mount("-t", "tmpfs", "-o", f"size={PLENTY}", "tmpfs")

    def leave(self, free: int) -> None:
        """Makes it so small that `free` bytes are left."""
        status = os.statvfs(self.path)
        used = (status.f_blocks - status.f_bfree) * status.f_frsize
        self._mount("-o", f"remount,size={used + free}")

    def grow(self) -> None:
        self._mount("-o", f"remount,size={PLENTY}")

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.path], check=True)

    def _mount(self, *options: str) -> None:
        done = subprocess.run(["mount", *options, self.path], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.close()


def until(daemon: Running, event: str, home: Home | None = None) -> bool:
    """Waits until the event is in the log; False where the daemon ends without it, or empties the inbox of `home`."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while event not in daemon.log:
        assert time.monotonic() < deadline, daemon.log
        if not daemon.running or (home and not os.listdir(home.inbox)):
            return event in daemon.log
        time.sleep(0.005)
    return True


def fill_up(world: World, disk: Disk, expected: dict[str, object], free: int) -> bool:
    """One run that starts with so many free bytes and gets plenty when it is stuck; True where it was."""
    home = world.home(disk.path / f"{free}")
    disk.leave(free)
    daemon = world.zygote.start(*watch(home))
    stuck = until(daemon, FULL, home)
    disk.grow()
    ended = settle(home, daemon, len(world.drops))
    if ended.code:  # it was too full even to start: with a word, and with a hint
        assert ended.code == 1 and '"hint"' in ended.log and "Traceback" not in ended.log, ended.log
    world.finish(home, {})
    assert outcome(home) == expected
    shutil.rmtree(home.root)
    return stuck or ended.code != 0


def test_wherever_the_disk_runs_full_nothing_is_lost(disk: Disk, world: World, expected: dict[str, object]) -> None:
    found = [fill_up(world, disk, expected, pages * PAGE) for pages in (0, 4, 12, 24, 40, 64, ENOUGH_PAGES)]
    assert found[0] and not found[-1]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_disk_runs_full_at_every_page(disk: Disk, world: World, expected: dict[str, object]) -> None:
    found = [fill_up(world, disk, expected, pages * PAGE) for pages in range(ENOUGH_PAGES)]
    assert found.count(True) > 10


def test_while_it_waits_for_space_it_serves_and_says_so(disk: Disk, world: World) -> None:
    home = world.home(disk.path / "home", fill=False)
    daemon = world.zygote.start("run", "--port", "0", "--home", home.root)
    assert until(daemon, '"ready"'), daemon.log
    url = next(json.loads(line)["url"] for line in daemon.log.splitlines() if "listening" in line)
    fill_inbox(Home(disk.path / "home"), world.drops[:1])
    disk.leave(0)
    assert until(daemon, FULL)
    told = httpx.get(f"{url}readyz")
    assert (told.status_code, [trouble["reason"] for trouble in told.json()["troubles"]]) == (503, ["disk_full"])
    assert "mainstem_disk_full 1.0" in httpx.get(f"{url}metrics").text
    assert httpx.get(f"{url}v1/heads/main/versions/0/files/config.json").json()["model_type"] == "tiny"
    disk.grow()
    assert until(daemon, '"merged"')
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "mainstem_disk_full 0.0" not in httpx.get(f"{url}metrics").text:
        assert time.monotonic() < deadline
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait().code == 0
    check(home, world.dropped[:1])


def test_where_no_byte_is_left_a_rollback_is_done_all_the_same(disk: Disk, world: World) -> None:
    """In the space that the daemon sets aside for that."""
    home = world.home(disk.path / "home", fill=False)
    fill_inbox(home, world.drops[:2])
    assert world.zygote.run(*drain(home)).code == 0
    daemon = world.zygote.start(*watch(home))
    assert until(daemon, '"ready"'), daemon.log
    disk.leave(0)
    done = world.zygote.run("rollback", "main/1", "--home", home.root)
    assert done.code == 0, done.log
    assert (home.versions("main") / "LATEST").read_text() == "000001\n"
    os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.wait().code == 0
    check(home, world.dropped[:2])


def test_with_webhooks_it_starts_on_a_full_disk_and_tells_them_once_there_is_room(disk: Disk, world: World) -> None:
    """Who is told is noted in the registry, which there is no room for."""
    home = world.home(disk.path / "home", fill=False)
    fill_inbox(home, world.drops[:1])
    with receiving() as receiver:
        hook = {"MAINSTEM_WEBHOOKS": json.dumps([receiver.webhook(events=["published"])])}
        disk.leave(10 * PAGE)  # as many as the registry needs to be opened
        daemon = world.zygote.start(*watch(home), **hook)
        assert until(daemon, "webhooks and hooks stay as they were"), daemon.log
        assert until(daemon, f"{FULL}: waiting for space"), daemon.log
        disk.grow()
        assert [one.what for one in receiver.wait(2)] == ["published 1"] * 2  # of two heads
        os.kill(daemon.pid, signal.SIGTERM)
        assert daemon.wait().code == 0
    check(home, world.dropped[:1])
