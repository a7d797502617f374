"""SIGTERM, and a second daemon, with real processes started as an operator starts them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from daemon.layout import Home
from tests.crash.daemons import ROOT, SETTINGS
from tests.crash.invariants import check, sha256
from tests.crash.worlds import World, drain, fill_inbox
from tests.models import write_base, write_expert

PATIENCE_SECONDS = 90.0


def start(home: Home, log: Path) -> subprocess.Popen[bytes]:
    """`python -m daemon run`, its log in a file."""
    arguments = [sys.executable, "-m", "daemon", "run", "--no-http", "--home", str(home.root)]
    with log.open("wb") as file:
        return subprocess.Popen(arguments, env=os.environ | SETTINGS, cwd=ROOT, stdout=file, stderr=file)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_sigterm_in_the_middle_of_a_merge_leaves_the_expert_in_the_inbox(world: World, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=0, hidden=768)
    home, log = Home(tmp_path / "home"), tmp_path / "log"
    assert world.zygote.run("init", home.root, "--base", base, "--preset", "opcm").code == 0
    experts = [write_expert(tmp_path / f"{seed}.safetensors", base, seed) for seed in (1, 2, 3)]
    dropped = [sha256(path) for path in experts]
    fill_inbox(home, experts)
    daemon = start(home, log)
    wait_for(lambda: home.archive(1).exists() and bool(os.listdir(home.tmp)))  # the second is in hand
    asked = time.monotonic()
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(timeout=20) == 0, log.read_text()
    assert time.monotonic() - asked < 10
    assert "abandoned" in log.read_text()
    assert home.clean.exists()
    assert not os.listdir(home.tmp)
    assert "3.safetensors" in os.listdir(home.inbox)
    check(home, dropped)
    assert world.zygote.run(*drain(home)).code == 0
    assert not os.listdir(home.inbox)
    check(home, dropped)


def test_sigterm_while_idle_and_a_second_daemon(world: World, tmp_path: Path) -> None:
    home, log = world.home(tmp_path / "home", fill=False), tmp_path / "log"
    daemon = start(home, log)
    wait_for(lambda: '"ready"' in log.read_text())
    second = world.zygote.run("run", "--no-http", "--home", home.root)
    assert second.code == 1
    assert "another mainstem is running" in second.log and '"hint"' in second.log
    assert daemon.poll() is None
    daemon.send_signal(signal.SIGTERM)
    assert daemon.wait(timeout=20) == 0, log.read_text()
    assert home.clean.exists()
