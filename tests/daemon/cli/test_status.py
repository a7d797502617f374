"""`mainstem status`: whether a daemon runs, where, what it merges, why something waits; homes that are only read."""

import io
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from daemon.cli.status import _shown, looked
from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.condition import _waiting
from daemon.home.health import Health, Trouble
from daemon.home.presence import MOST_WAITING, Presence
from daemon.home.presence import running as look
from daemon.layout import Home
from daemon.service import Service
from tests.daemon.homes import drain, lineage, make_home, put, quick
from tests.daemon.processes import forked, running, until
from tests.daemon.pulls import forking
from tests.models import write_base, write_expert
from tests.nobody import as_nobody


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home at version 4, whose last expert is far longer than the others."""
    root = tmp_path_factory.mktemp("status")
    base = write_base(root / "base.safetensors", seed=1)
    home = make_home(root / "home", base)
    for seed, scale in ((2, 0.01), (3, 0.01), (4, 0.01), (5, 0.2)):
        put(home, write_expert(root / f"{seed}.safetensors", base, seed, scale=scale))
        drain(home)
    return home


@pytest.fixture
def home(made: Home, tmp_path: Path) -> Home:
    return Home(shutil.copytree(made.root, tmp_path / "home", symlinks=True))


def told(home: Home) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(forked("status", home.root, "--json").stdout)
    return found


@contextmanager
def present(home: Home) -> Iterator[Presence]:
    """What a daemon says of itself, in this process."""
    fd, presence = durable.lock(home.lock), Presence(home)
    presence.starts()
    try:
        yield presence
    finally:
        presence.ends()
        os.close(fd)


def test_without_a_daemon_it_says_so_and_nothing_is_left_of_one(home: Home) -> None:
    (home.inbox / "one.safetensors").write_bytes(b"")
    (home.inbox / ".one.part").write_bytes(b"")
    said = told(home)
    assert said["daemon"] is None and said["inbox"] == ["one.safetensors"]
    (waiting,) = said["waiting"]
    assert (waiting["name"], waiting["why"]) == ("one.safetensors", "no daemon runs")
    assert waiting["since"].startswith("20") and (said["doing"], said["left_seconds"]) == ("no daemon", None)
    assert [one["reason"] for one in said["troubles"]] == ["no_daemon"]
    assert said["flagged"] == [{"id": 4, "name": "5.safetensors", "flags": ["long"]}]
    text = forked("status", home.root).stdout
    assert "daemon   no daemon runs: start `mainstem run`" in text and "main/4" in text
    assert "one.safetensors: no daemon runs" in text and "flagged  5.safetensors (long)" in text
    assert not home.presence.exists()


def test_what_the_daemon_does_and_why_each_entry_waits(home: Home) -> None:
    for name in ("in-hand", "half", "next"):
        (home.inbox / name).mkdir()
    with present(home) as presence:
        assert {one["why"] for one in told(home)["waiting"]} == {"the daemon is recovering"}
        presence.answers("http://127.0.0.1:1234/")
        presence.watches()
        presence.waits("half", "it has no weights yet")
        with presence.merging("in-hand"):
            before = home.presence.stat().st_mtime_ns
            presence.waits("half", "it has no weights yet")
            assert home.presence.stat().st_mtime_ns == before, "nothing has changed"
            presence.progresses(0.25)
            said = told(home)
            daemon, why = said["daemon"], {one["name"]: one["why"] for one in said["waiting"]}
            assert (daemon["pid"], daemon["url"], daemon["merging"]) == (
                os.getpid(),
                "http://127.0.0.1:1234/",
                "in-hand",
            )
            assert daemon["since"].endswith("+00:00") and daemon["merging_since"].endswith("+00:00")
            assert why["in-hand"].startswith("being merged since 20") and why["half"] == "it has no weights yet"
            assert "turn" in why["next"]
            text = forked("status", home.root).stdout
            assert (
                "daemon   merging in-hand: 25%" in text
                and f"(process {os.getpid()} since" in text
                and "at http://127.0.0.1:1234/" in text
            )
            assert "inbox    2 waiting\n" in text and "in-hand: being merged" not in text, "no more"
        Health(home, presence.wrong).note(Trouble("disk_full", "the disk is full", "make room"))
        said = told(home)
        assert said["daemon"]["merging"] is None and said["troubles"][0]["reason"] == "disk_full"
        assert {one["name"]: one["why"] for one in said["waiting"]}["next"] == "the disk is full"
        assert "wrong    the disk is full (make room)" in forked("status", home.root).stdout
    assert told(home)["daemon"] is None


def test_of_many_that_wait_the_last_are_noted(home: Home) -> None:
    with present(home) as presence:
        for n in range(MOST_WAITING + 5):
            presence.waits(f"{n}", "why")
        found = look(home)
        assert found and list(found.waiting) == [str(n) for n in range(5, MOST_WAITING + 5)]


def test_a_note_of_another_process_is_not_believed(home: Home) -> None:
    """A daemon was killed, and a rebuild holds the lock now."""
    Presence(home).starts()
    home.presence.write_text(home.presence.read_text().replace(str(os.getpid()), "1"))
    assert look(home) is None
    fd = durable.lock(home.lock)
    try:
        found = look(home)
        assert found and (found.pid, found.url) == (os.getpid(), None) and "another command" in found.doing
        (home.inbox / "one").mkdir()
        assert told(home)["waiting"][0]["why"] == "no daemon runs"
        home.presence.write_text("{")
        assert look(home) == found
    finally:
        os.close(fd)


def test_a_real_daemon_tells_of_itself(home: Home) -> None:
    (home.inbox / "half").mkdir()
    (home.inbox / "half" / "config.json").write_text("{}")
    settings = quick(http={"port": 0}, inbox={"patience_seconds": 3600})
    with forking(lambda: Service(home, settings).run()) as child:
        assert until(lambda: (now := look(home)) and now.url and now.waiting, 30)
        (waiting,) = told(home)["waiting"]
        assert waiting["name"] == "half" and "model.safetensors" in waiting["why"]
        os.kill(child, 15)
        os.waitpid(child, 0)
    assert look(home) is None and not home.presence.exists()


@pytest.fixture
def read_only(home: Home, tmp_path: Path) -> Iterator[Home]:
    """The same home on a mount that nobody can write to."""
    place = tmp_path / "mounted"
    place.mkdir()
    for words in (["--bind", home.root, place], ["-o", "remount,ro,bind", place]):
        done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield Home(place)
    finally:
        subprocess.run(["umount", place], check=True)


def test_a_home_on_a_read_only_mount_is_told_of_and_served(read_only: Home) -> None:
    with pytest.raises(OSError, match="Read-only"):
        (read_only.inbox / "x").mkdir()
    for words in (["status"], ["log"], ["show", "main/2"], ["show", "1"], ["compare", "main/1", "main/2"]):
        done = forked(*words, read_only.root)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert [one["reason"] for one in told(read_only)["troubles"]] == ["no_daemon"]
    with running("serve", read_only.root, "--port", "0") as server:
        assert server.live() == 4
        assert server.get("/").status_code == 200
        assert [one["reason"] for one in server.get("/readyz").json()["troubles"]] == ["no_daemon"]
        told_of = {line.split("{")[0].split()[0] for line in server.get("/metrics").text.splitlines()}
        ours = {name for name in told_of if name.startswith("mainstem_")}
        assert ours == {
            "mainstem_build_info",
            "mainstem_head_version",
            "mainstem_head_figure",
            "mainstem_head_frozen",
            "mainstem_head_held",
            "mainstem_head_newest_version",
            "mainstem_interventions_total",
            "mainstem_last_success_timestamp_seconds",
            "mainstem_quarantine_open",
            "mainstem_head_kept_versions",
            "mainstem_head_kept_bytes",
            "mainstem_home_experts",
            "mainstem_condition",
            "mainstem_trouble",
            *(f"mainstem_registry_transaction_seconds_{end}" for end in ("bucket", "count", "sum")),
            *(f"mainstem_http_request_seconds_{end}" for end in ("bucket", "count", "sum")),
            "mainstem_http_requests_total",
            "mainstem_http_requests_in_progress",
            "mainstem_http_sent_bytes_total",
        }
        assert server.stop() == 0


def test_it_is_seen_from_a_read_only_mount_whether_a_daemon_runs(home: Home, read_only: Home) -> None:
    with present(home) as presence:
        presence.watches()
        said = told(read_only)
        assert said["daemon"]["doing"] == "watching the inbox" and said["troubles"] == []


def test_an_inbox_that_the_user_may_not_list_is_told_of(home: Home) -> None:
    home.inbox.chmod(0)
    opened = [place for place in (home.root, *home.root.parents) if place.stat().st_mode & 0o5 != 0o5]
    modes = {place: place.stat().st_mode & 0o7777 for place in opened}
    try:
        for place in opened:
            place.chmod(modes[place] | 0o5)
        assert as_nobody(lambda: str(_waiting(home, set(), None, []))) == "None"
    finally:
        for place, mode in modes.items():
            place.chmod(mode)
        home.inbox.chmod(0o755)


def test_an_expert_is_shown_by_its_name_as_it_is_printed_and_as_it_lay_there(tmp_path: Path, made: Home) -> None:
    home = Home(shutil.copytree(made.root, tmp_path / "home", symlinks=True))
    (home.inbox / "new\nline.safetensors").write_bytes(b"no model")
    drain(home)
    printed = forked("log", home.root, "--limit", "1").stdout
    for name in ("new\\nline.safetensors", "new\nline.safetensors"):
        assert forked("show", name, home.root).returncode == 0, printed
    assert "new\\nline.safetensors" in printed


def test_show_with_a_home_and_no_id_says_what_is_missing(made: Home) -> None:
    wrong = forked("show", made.root)
    assert wrong.returncode == 2 and "is a home" in wrong.stderr


def test_several_homes_are_a_line_each(home: Home, tmp_path: Path) -> None:
    """Wherever they lie below, and none within another; one that cannot be read hides no other."""
    deep = tmp_path / "group" / "b"
    shutil.copytree(home.root, deep, symlinks=True)
    shutil.copytree(home.root, deep / "inbox" / "of-another-home", symlinks=True)
    Home(deep).registry.write_bytes(b"no registry")
    found = json.loads(forked("status", "--all", tmp_path, "--json").stdout)
    assert [(one["name"], one["doing"]) for one in found] == [("group/b", "unreadable"), ("home", "no daemon")]
    assert found[1]["heads"] == [{"name": "main", "live": 4, "newest": 4}] and found[1]["waiting"] == 0
    text = forked("status", "--all", tmp_path).stdout
    assert len(text.splitlines()) == 3 and "main/4" in text
    assert "there is no home" in forked("status", "--all", home.inbox).stderr
    assert forked("status", home.root, "--all", tmp_path).returncode == 2
    named = lambda: os.environ.update(MAINSTEM_HOME=str(home.root))  # noqa: E731
    assert forked("status", "--all", tmp_path, first=named).stdout == text


def test_watching_prints_a_line_for_each_change_and_ends_with_ctrl_c(home: Home) -> None:
    with running("status", home.root, "--watch") as watching:
        assert until(lambda: any("main/4 no daemon runs" in line for line in watching.lines), 60)
        with present(home) as presence:
            assert until(lambda: any("main/4 recovering" in line for line in watching.lines), 30)
            presence.watches()
            assert until(lambda: any("main/4 idle" in line for line in watching.lines), 30)
        watching.process.send_signal(signal.SIGINT)
        assert watching.process.wait(timeout=10) == 0
    assert len(watching.lines) <= 4, watching.lines


def test_on_a_terminal_it_is_drawn_again(home: Home) -> None:
    with lineage(home) as reader:
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(_shown(lambda: looked(home, reader)))
        text = console.export_text()
    assert "no daemon runs" in text and "main/4" in text and "opcm" in text

    def fail() -> dict[str, Any]:
        raise BadHome("it is gone", "look")

    assert "it is gone" in str(_shown(fail))
