"""`mainstem push`: an expert arrives whole, also over a network that breaks, and its sender hears what became of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon.arrivals.uploads import Uploads
from daemon.cli.push import STATUS, TOO_LATE, _check, _verdict
from daemon.config import Http
from daemon.errors import DaemonError, Reason
from daemon.home.standing import Outcome
from daemon.http import HttpServer, create_app
from daemon.interventions.deeds import Request, carry_out
from daemon.layout import Home
from daemon.pull import pushing
from daemon.pull.client import Origin, Passing
from daemon.pull.pushing import Pushed, push, verdict
from registry.reader import Reader
from registry.records import Deed
from registry.store import Store
from tests.daemon.following import follow
from tests.daemon.homes import drain, experts, lineage, put, quick
from tests.daemon.processes import forked
from tests.models import write_expert

TOKEN = "a-token-of-enough-characters"


@pytest.fixture
def served(home: Home) -> Iterator[tuple[Home, Origin]]:
    """A home whose uploads are taken, and nothing merged: what comes waits."""
    from prometheus_client import CollectorRegistry

    with Reader.open(home.registry) as reader:
        uploads = Uploads(home, Http.model_validate({"write_token": TOKEN}))
        server = HttpServer(create_app(home, reader, CollectorRegistry(), lambda: None, uploads), "127.0.0.1", 0)
        host, port = server.start()
        yield home, Origin.of(f"http://{host}:{port}", TOKEN)
        server.stop()


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "PAUSES", (0.05, 0.05))
    monkeypatch.setattr(pushing, "ASK_SECONDS", 0.05)


def test_each_verdict_has_its_status(served: tuple[Home, Origin], base: Path, tmp_path: Path) -> None:
    home, origin = served
    good, bad = write_expert(tmp_path / "good.safetensors", base, 2), tmp_path / "bad.safetensors"
    bad.write_bytes(b"no tensors")

    def told(path: Path, name: str) -> tuple[int, str]:
        pushed = push(path, origin, name)
        drain(home)
        found = verdict(origin, pushed, lambda _: None)
        assert found
        return STATUS[found["outcome"]], "\n".join(_verdict(found))

    assert told(good, "good.safetensors") == (0, "live: expert 1, in version 1")
    status, said = told(good, "again.safetensors")
    assert status == 6 and "is expert 1 once more" in said
    status, said = told(bad, "good.safetensors")
    assert status == 5 and said.startswith("refused: expert 3: ") and "hint: " in said
    with Store.open(home.registry) as store:
        carry_out(home, store, Request(Deed.ROLLBACK, "ada", head="main", version=0))
    status, said = told(write_expert(tmp_path / "folder", base, 3), "folder")
    assert status == 3 and "held: main/" in said and "`mainstem promote main/" in said
    assert {str(word) for word in Outcome} == STATUS.keys()
    done = forked("push", good, str(origin), "--token", TOKEN, "--name", "x.safetensors", "--wait", "--timeout", "0")
    assert done.returncode == TOO_LATE == 8 and "x.safetensors" in done.stdout and "no daemon runs" in done.stderr


def test_a_verdict_is_told_to_its_end_where_the_command_is() -> None:
    why = "a rule that a version breaks, " * 20 + "and by how much"
    hint = f"{why}, then `mainstem unblock 7` and `mainstem quarantine retry 7`"
    found: dict[str, Any] = {"outcome": "rejected", "id": 7, "reason": "scores", "detail": why, "hint": hint}
    assert _verdict(found) == [f"rejected: expert 7: scores: {why}", f"    hint: {hint}"]
    once_more = {**found, "outcome": "duplicate", "reason": None, "duplicate_of": 6}
    assert _verdict(once_more) == [f"duplicate: expert 7: {why}", f"    hint: {hint}"], "the other one is in no model"
    held = {"head": "main", "version": 3, "why": why, "command": "mainstem promote main/3"}
    assert why in _verdict({"outcome": "held", "id": 7, "held": [held]})[0]


@pytest.mark.parametrize("left", [0, 5, 100, -1])
def test_what_was_cut_off_is_not_sent(served: tuple[Home, Origin], base: Path, tmp_path: Path, left: int) -> None:
    home, origin = served
    whole = write_expert(tmp_path / "whole.safetensors", base, 2)
    (folder := tmp_path / "folder").mkdir()
    for cut in (tmp_path / "cut.safetensors", folder / "model.safetensors"):
        cut.write_bytes(whole.read_bytes()[:left])
        with pytest.raises(DaemonError, match=r"it ends at|it has no header") as caught:
            push(cut if cut.parent == tmp_path else folder, origin)
        assert "cut off" in caught.value.hint
    assert list(home.inbox.iterdir()) == []
    assert push(whole, origin).files == 1


def test_a_folder_that_is_there_in_part_is_not_sent_again(
    served: tuple[Home, Origin], base: Path, tmp_path: Path
) -> None:
    home, origin = served
    folder = write_expert(tmp_path / "folder", base, 3)
    (folder / "notes.txt").write_text("x" * 1000)
    (folder / ".hidden").write_text("not sent")
    parts = pushing.parts_of(folder)
    one = next(part for part in parts if part.name == "model.safetensors")
    sending = pushing._Pushing(origin, "folder", lambda *_: None)
    sending._put(f"{sending._address}/files/{one.name}", one)
    assert sending.asked()["state"] == "uploading"
    seen: list[tuple[int, int]] = []
    pushed = push(folder, origin, report=lambda *done: seen.append(done))
    assert pushed.files == len(parts) == len(list(folder.iterdir())) - 1
    assert pushed.sent_bytes == pushed.size_bytes - one.size_bytes and seen[-1] == (pushed.size_bytes,) * 2
    assert (home.inbox / "folder" / "notes.txt").read_text() == "x" * 1000
    with pytest.raises(DaemonError, match="lies in the inbox"):
        push(folder, origin)
    heard: list[str] = []
    assert verdict(origin, pushed, heard.append, 0) is None and heard == ["no daemon runs"]
    drain(home)
    found = verdict(origin, pushed, heard.append)
    assert found and found["outcome"] == "live" and found["version"] == 1
    again = push(folder, origin)
    assert again.after == 1, "what became of an earlier one of that name is not its verdict"
    shutil.rmtree(home.inbox / "folder")
    with pytest.raises(DaemonError, match="nothing is known of it"):
        verdict(origin, again, heard.append)


def test_a_name_that_begins_another_experts_sha256_is_a_name(
    served: tuple[Home, Origin], base: Path, tmp_path: Path
) -> None:
    home, origin = served
    push(write_expert(tmp_path / "one.safetensors", base, 2), origin)
    drain(home)
    digest = str(experts(home)[0].sha256)
    pushed = push(write_expert(tmp_path / "two", base, 3), origin, digest[:4])
    drain(home)
    found = verdict(origin, pushed, lambda _: None, 5)
    assert found and (found["id"], found["name"]) == (2, digest[:4])
    assert pushing._Pushing(origin, digest, lambda *_: None).asked()["id"] == 1


def test_the_verdict_on_what_was_sent_in_two_goes_is_not_that_of_an_earlier_one(
    served: tuple[Home, Origin], base: Path, tmp_path: Path
) -> None:
    home, origin = served
    push(write_expert(tmp_path / "one", base, 2), origin, "folder")
    drain(home)
    folder = write_expert(tmp_path / "two", base, 3)
    one = pushing.parts_of(folder)[0]
    sending = pushing._Pushing(origin, "folder", lambda *_: None)
    sending._put(f"{sending._address}/files/{one.name}", one)
    assert push(folder, origin, "folder").after == 1


def test_a_file_that_becomes_shorter_while_it_is_sent_is_not_waited_for(
    served: tuple[Home, Origin], base: Path, tmp_path: Path
) -> None:
    _, origin = served
    path = write_expert(tmp_path / "one.safetensors", base, 2)
    (part,) = pushing.parts_of(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DaemonError, match="8 bytes shorter"):
        pushing._Pushing(origin, "one.safetensors", lambda *_: None).file(part, 0)


def test_a_network_that_breaks_is_tried_again(
    served: tuple[Home, Origin], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, origin = served
    one = write_expert(tmp_path / "one.safetensors", base, 2)
    pieces, begun = pushing._Pushing._pieces, []

    def breaking(self: pushing._Pushing, part: pushing.Part) -> Iterator[bytes]:
        begun.append(part)
        whole = b"".join(pieces(self, part))
        if len(begun) < 3:
            yield whole[: len(whole) // 2]
            raise OSError("the cable was pulled")
        yield whole

    monkeypatch.setattr(pushing._Pushing, "_pieces", breaking)
    pushed = push(one, origin)
    assert (home.inbox / "one.safetensors").read_bytes() == one.read_bytes()
    assert pushed.sent_bytes == pushed.size_bytes and len(begun) == 3


def test_an_answer_that_was_lost_is_asked_for(
    served: tuple[Home, Origin], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes came, and the connection broke before the server could say so: nothing is sent twice."""
    home, origin = served
    problem, lost = pushing.Connection.ask, []

    @contextmanager
    def losing(self: pushing.Connection, method: str, *words: Any) -> Iterator[HTTPResponse]:
        with problem(self, method, *words) as answer:
            if method != "GET" and len(lost) < 2:
                lost.append(answer.status)
                raise Passing(Reason.PULL, "it broke", "try again")
            yield answer

    monkeypatch.setattr(pushing.Connection, "ask", losing)
    push(write_expert(tmp_path / "one.safetensors", base, 2), origin)
    monkeypatch.setattr(pushing._Pushing, "_put", lambda *_: 0)
    folder = write_expert(tmp_path / "folder", base, 3)
    sending = pushing._Pushing(origin, "folder", lambda *_: None)
    shutil.copytree(folder, home.inbox / "folder")  # as a commit whose answer was lost leaves it
    assert sending._committed(pushing.parts_of(folder)) is None
    assert lost == [201, 404] and len(list(home.inbox.iterdir())) == 2


def test_what_cannot_be_sent_is_said(served: tuple[Home, Origin], base: Path, tmp_path: Path) -> None:
    home, origin = served
    one = write_expert(tmp_path / "one.safetensors", base, 2)
    with pytest.raises(DaemonError, match="needs the write token") as raised:
        push(one, Origin.of(str(origin), "another-token-altogether"))
    assert "MAINSTEM_TOKEN" in raised.value.hint
    with pytest.raises(DaemonError, match="cannot be the name"):
        push(one, origin, "one.part")
    deep = tmp_path / "deep"
    (deep / "below").mkdir(parents=True)
    for path, why in ((deep, "a folder in it"), (deep / "below", "is empty"), (tmp_path / "no", "does not exist")):
        with pytest.raises(DaemonError, match=why):
            push(path, origin)
    assert list(home.inbox.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "other"),
    [("legal german.safetensors", "legal-german.safetensors"), ("naïve ünï", "naive-uni"), ("法律", "expert")],
)
def test_a_name_that_no_server_takes_is_mended_in_the_hint(tmp_path: Path, name: str, other: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DaemonError, match="cannot be the name") as raised:
        _check(tmp_path / name, None)
    assert raised.value.hint.startswith(f"send it as another: --name {other} (")
    _check(tmp_path / name, other)


def test_a_pickle_is_converted_before_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "my model.bin")
    with pytest.raises(DaemonError, match=r"is not a \.safetensors file") as raised:
        _check(tmp_path / "my model.bin", "mine")
    monkeypatch.chdir(tmp_path)
    follow(raised.value.hint)
    _check(tmp_path / "my model.safetensors", "mine")


def test_a_name_answers_for_what_is_there_now(served: tuple[Home, Origin], base: Path, tmp_path: Path) -> None:
    home, origin = served
    with lineage(home) as reader:
        from daemon.http.drops import Drops

        drops = Drops(home, reader, lambda name: [] if name == "coming" else None)
        assert drops.undecided("coming") == {
            "name": "coming",
            "state": "uploading",
            "why": "it is being sent",
            "before": None,
            "files": [],
        }
        assert drops.undecided("../inbox") is drops.undecided("..") is drops.undecided("nothing") is None
    for seed in (2, 3):
        put(home, write_expert(tmp_path / f"{seed}", base, seed), "same")
        assert pushing._Pushing(origin, "same", lambda *_: None).asked()["state"] == "waiting"
        drain(home, quick())
        found = pushing._Pushing(origin, "same", lambda *_: None).asked()
        assert (found["id"], found["outcome"], found["held"]) == (seed - 1, "live", [])
    assert [one.name for one in experts(home)] == ["same", "same"]
    assert pushing._Pushing(origin, "other", lambda *_: None).asked() == {}
    assert Pushed("same", 1, 1, 1, 2).after == 2
