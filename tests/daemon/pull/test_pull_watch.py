"""`mainstem pull --watch`: each new version, through restarts, to a clean end; and many pulls at a time."""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from operator import contains
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daemon.cli.pull import _Troubles
from daemon.errors import DaemonError
from daemon.layout import MANIFEST, Home
from daemon.pull.pulling import follow, pull
from tests.daemon.homes import lineage
from tests.daemon.processes import Daemon, forked, running, until
from tests.daemon.pulls import make_line, merge_one, same_bytes, served, version_in
from tests.models import WEIGHTS

KEPT_ONE = {"retention": {"versions": 1, "grace_seconds": 0}}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_line(tmp_path_factory.mktemp("line"), versions=1)


@pytest.fixture
def home(one: Home, tmp_path: Path) -> Home:
    """A home with version 1, to merge more into."""
    (tmp_path / "served").mkdir()
    return Home(shutil.copytree(one.root, tmp_path / "served" / "home", symlinks=True))


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.pull.pulling.POLL_SECONDS", 0.05)
    monkeypatch.setattr("daemon.pull.pulling.AWAY_SECONDS", (0.05, 0.1))
    monkeypatch.setattr("daemon.pull.pulling.DAMAGED_SECONDS", 0.1)


@contextmanager
def reading(folder: Path) -> Iterator[list[int]]:
    """Reads the folder's manifest all the time, as somebody who loads it may; the versions it saw, in order."""
    over = threading.Event()
    seen: list[int] = []
    faults: list[Exception] = []

    def read() -> None:
        while not over.is_set():
            try:
                number = json.loads((folder / MANIFEST).read_bytes())["version"]
            except (OSError, ValueError) as error:
                faults.append(error)
            else:
                if seen[-1:] != [number]:
                    seen.append(number)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    assert not faults


def test_each_new_version_takes_the_place_of_the_last(home: Home, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    with served(home) as origin, closing(follow(origin, dest)) as versions:
        assert (next(versions).version, version_in(dest)) == (1, 1)
        with reading(dest) as seen:
            for n in (2, 3, 4):
                merge_one(home, n)
                assert next(versions).version == n
                assert same_bytes(dest, home, n)
                assert until(partial(contains, seen, n), 10)
        assert seen == [1, 2, 3, 4]
    assert sorted(os.listdir(tmp_path)) == ["model", "served"]


def test_who_is_in_the_folder_keeps_the_version_until_the_next_but_one(home: Home, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    with served(home) as origin, closing(follow(origin, dest)) as versions:
        next(versions)
        inside = os.open(dest, os.O_RDONLY | os.O_DIRECTORY)
        merge_one(home, 2)
        next(versions)
        held = os.open(WEIGHTS, os.O_RDONLY, dir_fd=inside)
        assert os.pread(held, 1 << 20, 0) == (home.version("main", 1) / WEIGHTS).read_bytes()
        os.close(held)
        os.close(inside)


def test_a_server_that_ignores_the_waiting_or_says_nothing_new(home: Home, tmp_path: Path) -> None:
    asked: list[str] = []

    def forgetful(request: Request) -> Response | None:
        if "wait_for" in str(request.url):
            asked.append(str(request.url.query))
            if len(asked) % 2:
                return Response(status_code=204)
            request.scope["query_string"] = b""
        return None

    with served(home, forgetful) as origin, closing(follow(origin, tmp_path / "model")) as versions:
        next(versions)
        got: list[int] = []
        waiting = threading.Thread(target=lambda: got.append(next(versions).version))
        waiting.start()
        time.sleep(0.5)
        merge_one(home, 2)
        waiting.join(30)
        assert got == [2]
    assert 2 < len(asked) < 100, "it asked without a pause"
    assert asked[0] == "wait_for=2&have=1&timeout=30"


def test_a_head_that_is_rolled_back_is_followed(home: Home, tmp_path: Path) -> None:
    back = threading.Event()

    def rolled(request: Request) -> Response | None:
        if not request.url.path.endswith("/latest") or not back.is_set():
            return None
        waits = "wait_for" in str(request.url)
        return Response(status_code=204) if waits else Response(status_code=307, headers={"Location": "versions/0"})

    with served(home, rolled) as origin, closing(follow(origin, tmp_path / "model")) as versions:
        assert next(versions).version == 1
        back.set()
        assert next(versions).version == 0
    assert version_in(tmp_path / "model") == 0


def test_a_server_may_go_away_and_be_damaged_meanwhile(home: Home, tmp_path: Path) -> None:
    troubles: list[tuple[str, float]] = []
    dest = tmp_path / "model"
    back: list[int] = []

    def heard(error: DaemonError, pause: float) -> None:
        troubles.append((str(error), pause))

    following = follow(origin_of_nobody(), dest, trouble=heard, answered=lambda: back.append(len(troubles)))
    with closing(following) as versions:
        port = int(origin_of_nobody().rpartition(":")[2])
        starting = threading.Thread(target=next, args=(versions,))
        starting.start()
        assert until(lambda: len(troubles) > 3, 20)
        with served(home, port=port):
            starting.join(20)
            assert version_in(dest) == 1
        merge_one(home, 2)
        weights = home.version("main", 2) / WEIGHTS
        sound = weights.read_bytes()
        weights.chmod(0o644)
        weights.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        before = len(troubles)
        with served(home, port=port):
            mending = threading.Thread(target=next, args=(versions,))
            mending.start()
            assert until(lambda: any("its sha256" in text for text, _ in troubles[before:]), 20)
            assert version_in(dest) == 1
            weights.write_bytes(sound)
            mending.join(20)
        assert version_in(dest) == 2
    assert {pause for _, pause in troubles} == {0.05, 0.1}
    assert len(back) == 2 and back[1] == len(troubles)  # each time once, when the version was in place


def test_a_server_that_is_away_for_long_is_told_of_once(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(origin_of_nobody().rpartition(":")[2])
    troubles = _Troubles(origin_of_nobody())
    heard: list[str] = []

    def told(error: DaemonError, pause: float) -> None:
        heard.append(str(error))
        troubles.told(error, pause)

    following = follow(origin_of_nobody(), tmp_path / "model", trouble=told, answered=troubles.over)
    with closing(following) as versions:
        for _ in range(2):
            before, got = len(heard), threading.Thread(target=next, args=(versions,))
            got.start()
            assert until(lambda: len(heard) > before + 3, 20)  # noqa: B023
            with served(home, port=port):
                got.join(20)
            merge_one(home, 2)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("    hint")]
    lines = [line for line in lines if line.startswith("mainstem: ")]
    assert [line.endswith("answers again") for line in lines] == [False, True, False, True]


def test_a_token_goes_with_every_request_and_into_no_message(home: Home, tmp_path: Path) -> None:
    def guarded(request: Request) -> Response | None:
        known = request.headers.get("authorization") == "Bearer open-sesame"
        return None if known else Response("<html>", status_code=401)

    with served(home, guarded) as origin:
        for token in (None, "wrong-one"):
            with pytest.raises(DaemonError) as refused:
                pull(origin, tmp_path / "model", token=token)
            assert "--token" in refused.value.hint and "wrong-one" not in f"{refused.value}{refused.value.hint}"
        assert pull(origin, tmp_path / "model", token="open-sesame").version == 1
        done = forked("pull", origin, tmp_path / "again", "--token", "open-sesame")
        assert done.returncode == 0, done.stderr
    with pytest.raises(DaemonError, match="letters that none can have"):
        pull(origin, tmp_path / "model", token="a\r\nHost: b")


def origin_of_nobody() -> str:
    """An address where nothing listens until a test starts something there."""
    return f"http://127.0.0.1:{20000 + os.getpid() % 10000}"


@pytest.mark.parametrize(
    ("status", "reason"), [(404, "no such head"), (400, "a bad question")], ids=["unknown", "refused"]
)
def test_what_no_patience_helps_ends_it(status: int, reason: str, home: Home, tmp_path: Path) -> None:
    answer = JSONResponse({"error": reason, "reason": "x", "hint": "y"}, status)
    with served(home, lambda _: answer) as origin, pytest.raises(DaemonError, match=reason):
        next(follow(origin, tmp_path / "model"))
    assert os.listdir(tmp_path) == ["served"]


def finished(watching: Daemon, words: str, seconds: float = 30) -> bool:
    return until(lambda: any(words in line for line in watching.lines), seconds)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_follows_until_it_is_told_to_stop(stop: signal.Signals, home: Home, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    with served(home) as origin, running("pull", origin, dest, "--watch", "--json") as watching:
        assert finished(watching, '"version": 1')
        merge_one(home, 2)
        assert finished(watching, '"version": 2')
        watching.process.send_signal(stop)
        assert watching.process.wait(timeout=30) == 0
    assert [json.loads(line)["version"] for line in watching.lines if line.startswith("{")] == [1, 2]
    assert "Traceback" not in "".join(watching.lines)
    assert version_in(dest) == 2
    assert sorted(os.listdir(tmp_path)) == ["model", "served"]


@pytest.mark.parametrize("at_once", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_many_pulls_while_versions_change_and_old_ones_are_removed(home: Home, tmp_path: Path, at_once: int) -> None:
    """Whatever version each got, it is one that was committed, whole, byte for byte."""
    last, over = 4, threading.Event()

    def keep_pulling(number: int) -> list[int]:
        dest, got = tmp_path / "pulled" / f"{number}", []
        while True:
            ending = over.is_set()
            got.append(pull(origin, dest).version)
            assert version_in(dest) == got[-1]
            with lineage(home) as reader:
                row = reader.version("main", got[-1])
            assert row is not None
            assert hashlib.sha256((dest / MANIFEST).read_bytes()).hexdigest() == row.manifest_sha256
            if ending:
                return got

    with served(home) as origin, ThreadPoolExecutor(at_once) as pool:
        pulls = [pool.submit(keep_pulling, number) for number in range(at_once)]
        try:
            for n in range(2, last + 1):
                merge_one(home, n, **KEPT_ONE)
        finally:
            over.set()
        got = [one.result() for one in pulls]
    assert all(versions == sorted(versions) and versions[-1] == last for versions in got)
    assert len({version for versions in got for version in versions}) > 2, "the versions did not change meanwhile"
    assert not home.version("main", 2).exists(), "no version was removed"
