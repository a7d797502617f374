"""A hook is the operator's command: it gets arguments without a shell, and ends within its time or with the daemon."""

import json
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from daemon.layout import Home
from daemon.outbox.hooking import Hooking
from daemon.outbox.told import payload
from registry.records import Delivery, Event
from tests.daemon.processes import ended, until

WHEN = datetime(2026, 3, 1, 12, 30, 15, 123456, tzinfo=UTC)
PUBLISHED = Delivery(7, 1, "msg_1", Event.PUBLISHED, {"head": "main", "version": 12, "expert": "legal"}, WHEN)
SECONDS = 60.0  # which no test waits for


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "a home")
    (home.version("main", 12) / "adapter").mkdir(parents=True)
    return home


def test_an_event_says_where_its_version_is(home: Home) -> None:
    folder = str(home.version("main", 12))
    assert payload(home, PUBLISHED) == {
        "type": "published",
        "timestamp": "2026-03-01T12:30:15.123+00:00",
        "data": {
            "home": str(home.root),
            "head": "main",
            "version": 12,
            "expert": "legal",
            "folder": folder,
            "adapter": f"{folder}/adapter",
            "path": "/v1/heads/main/versions/12",
        },
    }
    refused = payload(home, replace(PUBLISHED, event=Event.REFUSED, data={"expert": "x"}))
    assert refused["data"] == {"home": str(home.root), "expert": "x"}


def test_the_command_gets_its_arguments_and_the_event(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_HTTP__WRITE_TOKEN", "a secret")
    monkeypatch.setenv("MAINSTEM_WEBHOOKS", "[]")
    script = (
        "import json, os, sys; json.dump([sys.argv[1:], json.load(sys.stdin), dict(os.environ)], open('said', 'w'))"
    )
    words = ("{folder}", "to={head}/{version}", "{adapter}", "$HOME; {x} {", "a\nb")
    answer = Hooking(home, (sys.executable, "-c", script, *words), SECONDS).deliver(PUBLISHED)
    assert answer.delivered and answer.text == "exit status 0"
    given, told, environment = json.loads((home.root / "said").read_text())
    folder = str(home.version("main", 12))
    assert given == [folder, "to=main/12", f"{folder}/adapter", "$HOME; {x} {", "a\nb"]
    assert told == payload(home, PUBLISHED)
    assert "PATH" in environment and not {"MAINSTEM_HTTP__WRITE_TOKEN", "MAINSTEM_WEBHOOKS"} & environment.keys()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo one; echo two >&2; exit 3", "exit status 3: one two"),
        ("kill -TERM $$", "ended by SIGTERM"),
        ("head -c 9000 /dev/zero | tr '\\0' x; exit 1", f"exit status 1: {'x' * 500}"),
    ],
)
def test_what_went_wrong_is_said_with_the_end_of_what_it_wrote(home: Home, script: str, said: str) -> None:
    answer = Hooking(home, ("sh", "-c", script), SECONDS).deliver(PUBLISHED)
    assert (answer.delivered, answer.text) == (False, said)


def test_a_program_that_is_not_there_has_not_run(home: Home) -> None:
    answer = Hooking(home, ("/no/such/program",), SECONDS).deliver(PUBLISHED)
    assert not answer.delivered and "No such file" in answer.text


def test_an_adapter_that_is_not_there_is_not_handed_over(home: Home) -> None:
    (home.version("main", 12) / "adapter").rmdir()
    answer = Hooking(home, ("touch", "{adapter}"), SECONDS).deliver(PUBLISHED)
    assert not answer.delivered and "heads.main.adapter" in answer.text


@pytest.mark.parametrize("end", ["time", "abort"])
def test_it_ends_within_its_time_or_with_the_daemon(home: Home, end: str) -> None:
    """And all that it has started ends with it."""
    script = "sleep 1000 & echo $! > pid; echo waiting; wait"
    hook = Hooking(home, ("sh", "-c", script), 0.3 if end == "time" else SECONDS)
    pid = home.root / "pid"

    def abort() -> None:
        assert until(lambda: pid.exists() and pid.read_text(), SECONDS)
        hook.abort()

    if end == "abort":
        threading.Thread(target=abort).start()
    answer = hook.deliver(PUBLISHED)
    assert not answer.delivered
    assert answer.text.startswith("took longer than 0.3 s" if end == "time" else "ended with the daemon")
    if pid.exists() and pid.read_text():
        assert until(lambda: ended(int(pid.read_text())), SECONDS)


def test_it_runs_once_latest_names_the_version(home: Home) -> None:
    """Which it does a moment after the commit that the event came with."""
    link = home.latest("main")
    link.symlink_to("000011")

    def follow() -> None:
        new = link.with_name("new")
        new.symlink_to("000012")
        new.replace(link)

    threading.Timer(0.1, follow).start()
    answer = Hooking(home, ("readlink", str(link)), SECONDS).deliver(PUBLISHED)
    assert answer.text == "exit status 0: 000012"
