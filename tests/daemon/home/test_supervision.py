"""What a daemon tells systemd, held by a real socket; and what one that hangs does not."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from daemon.compute.progress import Progress
from daemon.compute.resources import longest_seconds
from daemon.evaluation.evaluator import Evaluator
from daemon.home.presence import Doing, Running
from daemon.home.supervision import PATIENCE_SECONDS, Supervision
from daemon.layout import Home
from daemon.reloading import Stop
from daemon.service import Service
from projector.methods import make
from projector.spec import TensorSpec
from tests.daemon.homes import live, put, quick
from tests.daemon.processes import running, until
from tests.models import write_expert

HEARING = """
import json, socket, sys
heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
heard.bind(sys.argv[1])
while True:
    print(json.dumps(heard.recv(1 << 16).decode()), flush=True)
"""


class Systemd:
    """What arrives at NOTIFY_SOCKET, one message after another; heard by another process, as systemd is one: who tells
    it waits, with all its threads, where much was not taken yet.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._heard = path, path.with_name("heard")
        with self._heard.open("wb") as into:
            self._process = subprocess.Popen([sys.executable, "-c", HEARING, path], stdout=into)
        assert until(path.exists, 30)

    @property
    def messages(self) -> list[str]:
        return [json.loads(line) for line in self._heard.read_text().splitlines()]

    def lines(self) -> list[str]:
        return [line for message in self.messages for line in message.splitlines()]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    found = Systemd(tmp_path / "notify")
    yield found
    found.close()


def test_systemd_hears_of_the_start_of_each_step_and_of_what_is_done(
    home: Home, base: Path, tmp_path: Path, systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    monkeypatch.setenv("WATCHDOG_USEC", "1")  # so little that no sign of life is left out
    put(home, write_expert(tmp_path / "tune.safetensors", base, seed=2))
    command = ["sh", "-c", "sleep 0.3; echo '{\"task\": 1.0}'", "{folder}"]
    Service(home, quick(evaluate={"command": command})).run(once=True, http=False)
    assert live(home) == 1
    assert until(lambda: systemd.lines().count("STATUS=watching the inbox") == 2, 30), (
        "when it is ready, and at the end"
    )
    lines = systemd.lines()
    ready = lines.index("READY=1")
    assert lines.count("READY=1") == 1
    assert "STATUS=recovering" in lines[:ready]
    assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in lines[:ready])
    assert "WATCHDOG=1" not in lines[:ready]
    usec = next(int(line.partition("=")[2]) for line in lines[ready:] if line.startswith("WATCHDOG_USEC="))
    assert usec > 1, "the model's own longest step counts where that is more"
    merging = next(n for n, line in enumerate(lines) if line.startswith("STATUS=merging tune.safetensors"))
    assert lines[merging:].count("WATCHDOG=1") > 20
    assert not any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in lines[ready:])


def test_an_evaluator_that_takes_long_is_no_hang(home: Home, base: Path, tmp_path: Path, systemd: Systemd) -> None:
    """It is looked at some times a second, and each look is a sign of life."""
    signs: list[str] = []
    supervision = Supervision({})
    supervision.beat = lambda: signs.append("beat")  # type: ignore[method-assign]
    settings = quick(evaluate={"command": ["sh", "-c", "sleep 0.5; echo '{\"task\": 1.0}'", "{folder}"]}).evaluate
    watch = Progress(Stop(supervision), lambda _: None)
    Evaluator(settings, home.root, watch).run(home.base, {})
    assert len(signs) >= 4


def test_a_loop_that_hangs_gives_no_sign_of_life(home: Home, base: Path, tmp_path: Path, systemd: Systemd) -> None:
    told = {"NOTIFY_SOCKET": str(systemd.path), "WATCHDOG_USEC": "1000000", "MAINSTEM_FAILPOINT": "fold.before=hang"}
    with running("run", "--home", home.root, "--port", "0", **told) as daemon:
        assert until(lambda: "READY=1" in systemd.lines(), 60)
        before = len(systemd.lines())
        assert until(lambda: systemd.lines()[before:].count("WATCHDOG=1") > 3, 30), "it waits for experts, and lives"
        assert until(lambda: daemon.get("/livez").status_code == 200, 30)
        put(home, write_expert(tmp_path / "tune.safetensors", base, seed=2))
        assert until(lambda: daemon.get("/livez").status_code == 503, 30)
        assert daemon.get("/livez").json()["reason"] == "hung"
        assert "hung" in [one["reason"] for one in daemon.get("/readyz").json()["troubles"]]
        hung = len(systemd.messages)
        assert not until(lambda: len(systemd.messages) > hung, 1.2)
        daemon.process.send_signal(signal.SIGTERM)
        assert until(lambda: "STOPPING=1" in systemd.lines(), 30)


def test_who_is_told_to_stop_says_so_and_asks_for_the_time_that_it_takes(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    supervision = Supervision()
    supervision.hears(Running(1, "2026-01-01T00:00:00+00:00", Doing.WATCHING))
    supervision.stops()
    supervision.hears(Running(1, "2026-01-01T00:00:00+00:00", Doing.MERGING))
    assert until(lambda: len(systemd.messages) > 1, 30)
    assert systemd.messages == [
        "READY=1\nSTATUS=watching the inbox",
        f"STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC={int(PATIENCE_SECONDS * 1e6)}",
    ]


def test_a_sign_of_life_that_nobody_hears_ends_nothing(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path.with_name("gone")))
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    supervision = Supervision()
    supervision.hears(Running(1, "2026-01-01T00:00:00+00:00", Doing.WATCHING))
    supervision.beat()
    monkeypatch.setenv("NOTIFY_SOCKET", str(systemd.path))
    supervision.beat()
    assert until(lambda: systemd.messages == ["WATCHDOG=1"], 30), "systemd is back, and hears the next"


def test_without_the_package_the_log_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cysystemd.daemon", None)
    Supervision({"NOTIFY_SOCKET": "/nowhere"}).beat()
    assert "pip install 'mainstem[systemd]'" in "".join(capsys.readouterr())


def test_a_watchdog_of_another_process_is_not_ours() -> None:
    assert Supervision({"WATCHDOG_USEC": "5000000"}).patience_seconds == 5
    assert Supervision({"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}).patience_seconds == PATIENCE_SECONDS
    assert Supervision({}).patience_seconds == PATIENCE_SECONDS


def test_the_loop_never_waits_as_long_as_its_watchdog(home: Home) -> None:
    service = Service(home, quick(inbox={"scan_seconds": 86400}))
    assert service._pause(False) <= service._supervision.patience_seconds / 2


@pytest.mark.parametrize(
    ("method", "shape", "minutes"),
    [
        ("opcm", (768, 768), 1),
        ("opcm", (4096, 4096), 20),
        ("opcm", (8192, 28672), 200),
        ("opcm", (8, 4096, 14336), 200),
        ("tsv_m", (256, 7168, 2048), 800),
        ("wudi", (4096, 4096), 100),
        ("mean", (8192, 28672), 2),
    ],
)
def test_what_takes_long_is_given_time(method: str, shape: tuple[int, ...], minutes: float) -> None:
    found = longest_seconds({"w": TensorSpec("w", shape, torch.bfloat16)}, [make(method, {})])
    assert minutes / 20 < found / 60 < minutes
