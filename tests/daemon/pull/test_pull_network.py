"""`mainstem pull` over a network that breaks, and from a server that is away: every byte is right, or there is none."""

import json
import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from daemon.errors import DaemonError
from daemon.layout import Home
from daemon.pull.client import Passing
from daemon.pull.pulling import pull
from tests.daemon.processes import until
from tests.daemon.pulls import Wire, ended, forking, make_line, same_bytes, served
from tests.models import WEIGHTS

PIECE = 64 << 10
VERSION = 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """Its weights take some fifty pieces."""
    return make_line(tmp_path_factory.mktemp("line"), versions=VERSION, hidden=300)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pieces and short pauses: the rules are the same."""
    monkeypatch.setattr("daemon.pull.fetching.PIECE_BYTES", PIECE)
    monkeypatch.setattr("daemon.pull.fetching.PAUSES", (0.01, 0.02, 0.05))
    monkeypatch.setattr("daemon.pull.pulling.PIECE_BYTES", PIECE)
    monkeypatch.setattr("daemon.pull.pulling.ASK_PAUSES", (0.01, 0.02))


def honest(_: int, __: int, chunk: bytes) -> bytes:
    return chunk


def spoil(chunk: bytes) -> bytes:
    """One bit changed, where the chunk is of a large body and has no header in it."""
    half = len(chunk) // 2
    is_body = len(chunk) > 8000 and b"\r\n" not in chunk
    return chunk[:half] + bytes([chunk[half] ^ 1]) + chunk[half + 1 :] if is_body else chunk


def test_connections_are_kept_and_no_byte_comes_twice(origin: str, home: Home, tmp_path: Path) -> None:
    with Wire(origin, honest) as wire:
        pulled = pull(wire.origin, tmp_path / "model", connections=3)
    assert same_bytes(tmp_path / "model", home, VERSION)
    assert pulled.size_bytes / PIECE > 30
    assert wire.connections == 2 + 3  # latest and the manifest ask for themselves
    assert pulled.fetched_bytes == pulled.size_bytes < wire.carried < 1.05 * pulled.size_bytes


def test_a_connection_that_is_cut_again_and_again_goes_on_where_it_was(origin: str, home: Home, tmp_path: Path) -> None:
    def cut(_: int, at: int, chunk: bytes) -> bytes | None:
        return None if at > 100_000 else chunk

    with Wire(origin, cut) as wire:
        pulled = pull(wire.origin, tmp_path / "model")
    assert same_bytes(tmp_path / "model", home, VERSION)
    assert wire.connections > 20
    assert pulled.fetched_bytes == pulled.size_bytes  # what came before a cut was not fetched again


def test_a_network_that_stays_broken_is_given_up_and_the_next_call_goes_on(
    origin: str, home: Home, tmp_path: Path
) -> None:
    def wall(number: int, _: int, chunk: bytes) -> bytes | None:
        return None if number >= 8 or wire.carried > 1_000_000 else chunk

    with Wire(origin, wall) as wire, pytest.raises(Passing) as broken:
        pull(wire.origin, tmp_path / "model")
    assert WEIGHTS in str(broken.value) and "try again" in broken.value.hint
    assert os.listdir(tmp_path) == [".model.partial"]
    pulled = pull(origin, tmp_path / "model")
    assert same_bytes(tmp_path / "model", home, VERSION)
    assert os.listdir(tmp_path) == ["model"]
    assert pulled.fetched_bytes < pulled.size_bytes - 500_000


def test_a_call_that_comes_to_nothing_does_not_throw_away_what_is_there(
    origin: str, home: Home, tmp_path: Path
) -> None:
    """The server is still away, or a name was mistyped: neither is a reason to begin anew."""

    def wall(_: int, __: int, chunk: bytes) -> bytes | None:
        return None if wire.carried > 1_000_000 else chunk

    with Wire(origin, wall) as wire:
        for _ in range(2):  # the second finds nobody at all
            with pytest.raises(Passing):
                pull(wire.origin, tmp_path / "model")
    with pytest.raises(DaemonError, match="no such head"):
        pull(origin, tmp_path / "model", head="mian")
    pulled = pull(origin, tmp_path / "model")
    assert same_bytes(tmp_path / "model", home, VERSION)
    assert os.listdir(tmp_path) == ["model"]
    assert pulled.fetched_bytes < pulled.size_bytes - 500_000


def test_a_manifest_that_breaks_off_is_asked_for_again(home: Home, tmp_path: Path) -> None:
    cut: list[str] = []

    def short(request: Request) -> Response | None:
        if cut or not request.url.path.endswith(f"/versions/{VERSION}"):
            return None
        cut.append(request.url.path)
        return Response(b"{", headers={"Content-Length": "500"})

    with served(home, short) as origin:
        pull(origin, tmp_path / "model")
    assert cut and same_bytes(tmp_path / "model", home, VERSION)


@pytest.mark.parametrize("to_come", [VERSION, VERSION - 1])
def test_a_killed_pull_is_taken_up_again_by_one_of_the_same_version(
    to_come: int, origin: str, home: Home, tmp_path: Path
) -> None:
    still = threading.Event()

    def stall(_: int, __: int, chunk: bytes) -> bytes:
        if wire.carried > 1_500_000:
            still.wait(30)
        return chunk

    dest, journal = tmp_path / "model", tmp_path / ".model.partial" / "journal"
    with Wire(origin, stall) as wire, forking(lambda: pull(wire.origin, dest)) as child:
        assert until(lambda: wire.carried > 1_500_000, 30)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        still.set()
    there = sum(PIECE for line in journal.read_bytes().splitlines()[1:] if json.loads(line)[0] == WEIGHTS)
    assert there > 10 * PIECE and not dest.exists()
    pulled = pull(origin, dest, version=str(to_come))
    assert same_bytes(dest, home, to_come)
    assert pulled.fetched_bytes <= pulled.size_bytes - (there if to_come == VERSION else 0)
    assert (pulled.fetched_bytes == pulled.size_bytes) == (to_come != VERSION)
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_killed_pull_left_is_not_believed(origin: str, home: Home, tmp_path: Path) -> None:
    """As after a power failure: the journal is there and the bytes are not, or the journal itself is torn."""

    def wall(number: int, _: int, chunk: bytes) -> bytes | None:
        return None if wire.carried > 1_000_000 else chunk

    with Wire(origin, wall) as wire, pytest.raises(Passing):
        pull(wire.origin, tmp_path / "model")
    left = tmp_path / ".model.partial" / "new" / WEIGHTS
    size = left.stat().st_size
    left.write_bytes(bytes(size))
    with (tmp_path / ".model.partial" / "journal").open("ab") as journal:
        journal.write(b'["model.safete')
    pull(origin, tmp_path / "model")
    assert same_bytes(tmp_path / "model", home, VERSION)


def test_a_byte_that_changes_on_the_way_is_found(origin: str, home: Home, tmp_path: Path) -> None:
    hits: list[int] = []

    def spoil_once(number: int, at: int, chunk: bytes) -> bytes:
        spoilt = chunk if hits or at < 200_000 else spoil(chunk)
        if spoilt != chunk:
            hits.append(number)
        return spoilt

    with Wire(origin, spoil_once) as wire:
        pulled = pull(wire.origin, tmp_path / "model")
    assert hits and same_bytes(tmp_path / "model", home, VERSION)
    assert pulled.fetched_bytes > pulled.size_bytes  # the file came anew


def test_bytes_that_always_change_are_named(origin: str, tmp_path: Path) -> None:
    def always(_: int, __: int, chunk: bytes) -> bytes:
        return spoil(chunk)

    pull(origin, tmp_path / "model", version="1")
    with Wire(origin, always) as wire, pytest.raises(DaemonError, match=rf"^{WEIGHTS}: its sha256 is not") as wrong:
        pull(wire.origin, tmp_path / "model", connections=1)
    assert "mainstem verify" in wrong.value.hint
    assert os.listdir(tmp_path) == ["model"]
    pull(origin, tmp_path / "model", version="1")


def test_a_silent_server_is_not_waited_for_for_ever(
    origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.pull.fetching.STALL_SECONDS", 0.2)
    over = threading.Event()

    def silent(_: int, __: int, chunk: bytes) -> bytes:
        if wire.carried > 500_000:
            over.wait(20)
        return chunk

    with Wire(origin, silent) as wire:
        began = time.monotonic()
        with pytest.raises(Passing, match="timed out"):
            pull(wire.origin, tmp_path / "model")
        assert time.monotonic() - began < 15
        over.set()


def test_a_busy_server_is_asked_again_but_not_for_ever(home: Home, tmp_path: Path) -> None:
    asked: Counter[tuple[str, str]] = Counter()
    busy = JSONResponse({"error": "too much to do", "reason": "busy", "hint": "wait"}, 503)

    def sometimes(request: Request) -> Response | None:
        what = (request.url.path, request.headers.get("range", ""))
        asked[what] += 1
        return busy if asked[what] <= 2 else None

    with served(home, sometimes) as origin:
        pull(origin, tmp_path / "model")
    assert same_bytes(tmp_path / "model", home, VERSION)

    def always(request: Request) -> Response | None:
        return busy if "/files/" in request.url.path else None

    with served(home, always) as origin, pytest.raises(Passing, match="too much to do"):
        pull(origin, tmp_path / "other")


def test_a_server_that_restarts_in_the_middle_is_waited_for(home: Home, tmp_path: Path) -> None:
    with served(home) as origin:
        pass
    halted = threading.Event()

    def halt(request: Request) -> Response | None:
        if "/files/" in request.url.path and len(seen) > 10:
            halted.set()
        seen.append(request.url.path)
        return None

    seen: list[str] = []
    port = int(origin.rpartition(":")[2])
    done: list[object] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("daemon.pull.fetching.PAUSES", (0.1, 0.2, 0.5, 1.0, 2.0, 4.0))
        with served(home, halt, port):
            pulling = threading.Thread(target=lambda: done.append(pull(origin, tmp_path / "model")))
            pulling.start()
            assert halted.wait(30)
        time.sleep(0.3)
        with served(home, port=port):
            pulling.join(60)
    assert done and same_bytes(tmp_path / "model", home, VERSION)


@pytest.mark.parametrize("version", ["latest", "1"])
def test_a_version_that_is_removed_while_it_is_pulled(version: str, home: Home, tmp_path: Path) -> None:
    gone = {"error": "version 1 was removed by retention", "reason": "collected", "hint": "the live version is 2"}
    asked: list[str] = []

    def collect(request: Request) -> Response | None:
        path = request.url.path
        if path.endswith("/latest") and not asked:
            asked.append(path)
            return Response(status_code=307, headers={"Location": "versions/1"})
        return JSONResponse(gone, 410) if f"/versions/1/files/{WEIGHTS}" in path else None

    with served(home, collect) as origin:
        if version == "latest":
            assert pull(origin, tmp_path / "model").version == VERSION
            assert same_bytes(tmp_path / "model", home, VERSION)
        else:
            with pytest.raises(DaemonError, match="removed by retention") as refused:
                pull(origin, tmp_path / "model", version=version)
            assert refused.value.hint == "the live version is 2"
            assert os.listdir(tmp_path) == []


def test_a_head_whose_versions_are_all_removed_at_once_is_given_up(home: Home, tmp_path: Path) -> None:
    gone = {"error": "removed", "reason": "collected", "hint": "another"}

    def collect(request: Request) -> Response | None:
        return JSONResponse(gone, 410) if "/files/" in request.url.path else None

    with served(home, collect) as origin, pytest.raises(DaemonError, match="in a row were removed") as refused:
        pull(origin, tmp_path / "model")
    assert "retention.versions" in refused.value.hint


def test_a_server_without_ranges_is_named(home: Home, tmp_path: Path) -> None:
    def whole(request: Request) -> Response | None:
        request.scope["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
        return None

    with served(home, whole) as origin, pytest.raises(DaemonError, match="where a piece was asked for"):
        pull(origin, tmp_path / "model")
    assert os.listdir(tmp_path) == []
