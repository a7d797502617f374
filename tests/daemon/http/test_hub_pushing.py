"""The Hub's protocol, pushed: what is committed enters the inbox whole, once, and nothing else does."""

import base64
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from daemon.arrivals import pushes, uploads
from daemon.arrivals.uploads import Uploads
from daemon.config import Http
from daemon.disk import durable
from daemon.disk.durable import Folder, SyncFailed
from daemon.home.recovery import recover
from daemon.http.hub import pushing
from daemon.layout import Home
from registry.store import Store
from tests.daemon.homes import tree
from tests.daemon.http.test_http_uploads import BEARER, TOKEN, Server

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line, Readiness

MODEL = "/api/models/mainstem/german"
WEIGHTS = bytes(range(256)) * 5000


class Hub(Server):
    """A server that is pushed to."""

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.client.post(path, json=body, headers=BEARER, **more)

    def send(self, files: dict[str, bytes], name: str = "german") -> httpx.Response:
        """Puts files by git-lfs; the last answer."""
        objects = [{"oid": sha256(data), "size": len(data)} for data in files.values()]
        answer = self.post(f"/mainstem/{name}.git/info/lfs/objects/batch", {"operation": "upload", "objects": objects})
        assert answer.status_code == 200, answer.text
        by_digest = {sha256(data): data for data in files.values()}
        for one in answer.json()["objects"]:
            if "actions" in one:
                answer = self.client.put(one["actions"]["upload"]["href"], content=by_digest[one["oid"]])
        return answer

    def commit(
        self,
        small: dict[str, bytes] | None = None,
        large: dict[str, bytes] | None = None,
        gone: tuple[str, ...] = (),
        summary: str = "Upload model",
        name: str = "german",
    ) -> httpx.Response:
        self.send(large or {}, name)
        lines: list[dict[str, Any]] = [{"key": "header", "value": {"summary": summary, "description": ""}}]
        for path, data in (small or {}).items():
            value = {"content": base64.b64encode(data).decode(), "path": path, "encoding": "base64"}
            lines.append({"key": "file", "value": value})
        for path, data in (large or {}).items():
            lines.append({"key": "lfsFile", "value": {"path": path, "algo": "sha256", "oid": sha256(data)}})
        for path in gone:
            kind = "deletedFolder" if path.endswith("/") else "deletedFile"
            lines.append({"key": kind, "value": {"path": path}})
        raw = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        return self.commit_raw(raw, name)

    def commit_raw(self, raw: bytes, name: str = "german") -> httpx.Response:
        return self.client.post(f"/api/models/mainstem/{name}/commit/main", content=raw, headers=BEARER)

    def rest(self, seconds: float = 31) -> None:
        """Lets so much time pass without a commit."""
        for one in self.uploads._open.values():
            one.touched -= seconds
        self.uploads.tend()

    def pushed(self) -> list[str]:
        return sorted(path.name for path in self.home.inbox.iterdir())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def error(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["reason"]


@pytest.fixture
def hub(line: "Line", readiness: "Readiness") -> Iterator[Hub]:
    server = Hub(line, readiness)
    yield server
    server.close()


def test_what_was_committed_enters_whole_once_no_other_commit_follows(hub: Hub) -> None:
    assert (
        hub.post("/api/repos/create", {"name": "german", "organization": "mainstem"})
        .json()["url"]
        .endswith("/mainstem/german")
    )
    small = {"config.json": b"{}", "1_Pooling/config.json": b"{ }", ".gitattributes": b"x", "a.tmp": b"y", "empty": b""}
    large = {"model.safetensors": WEIGHTS, "last-checkpoint/model.safetensors": WEIGHTS}
    answer = hub.commit(small, large)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["in_inbox"], answer.json()["waits_seconds"]) == (False, 30)
    assert answer.json()["commitUrl"].endswith(f"/mainstem/german/commit/{answer.json()['commitOid']}")
    hub.rest(29)
    assert hub.pushed() == [] and hub.client.get(MODEL).json()["sha"] == answer.json()["commitOid"]
    told = hub.client.get("/v1/experts/german").json()
    assert told["state"] == "uploading" and "1_Pooling/config.json" in [file["name"] for file in told["files"]]
    hub.rest(2)
    assert hub.pushed() == ["german"] and hub.left() == []
    kept = {path: data for path, data in (small | large).items() if path not in (".gitattributes", "a.tmp")}
    assert {name: data for name, data in tree(hub.home.inbox / "german").items() if data != "folder"} == kept
    assert (hub.home.inbox / "german" / "config.json").stat().st_nlink == 1
    assert hub.client.get(MODEL).status_code == 404
    assert hub.commit(small, large).json()["commitOid"] == answer.json()["commitOid"]


def test_a_commit_that_brings_ready_enters_at_once(hub: Hub) -> None:
    answer = hub.commit({"model.safetensors": b"m", "_READY": b""})
    assert (answer.json()["in_inbox"], hub.pushed()) == (True, ["german"])
    assert hub.commit({"_READY": b""}, name="other").json()["in_inbox"] is False  # and no weights


def test_of_several_commits_the_last_is_the_expert(hub: Hub) -> None:
    hub.commit({"tokenizer.json": b"t", "old/a": b"1", "old/b": b"2", "config.json": b"{}"})
    for n in range(3):
        hub.rest(20)
        hub.commit({"README.md": b"step %d" % n}, {"model.safetensors": WEIGHTS + b"%d" % n}, gone=("old/",))
    assert len([name for name in hub.left() if "push.json" not in name]) == 1 + 4  # what was replaced is gone
    hub.commit(gone=("config.json", "none"))
    assert hub.pushed() == []
    hub.rest()
    found = tree(hub.home.inbox / "german")
    assert found == {"tokenizer.json": b"t", "README.md": b"step 2", "model.safetensors": WEIGHTS + b"2"}


def test_of_two_who_push_to_one_name_the_one_that_names_its_parent_undoes_nothing(hub: Hub) -> None:
    first = hub.commit({"model.safetensors": b"one", "config.json": b"{}"}).json()["commitOid"]

    def onto(parent: str, data: bytes) -> httpx.Response:
        file = {"content": base64.b64encode(data).decode(), "path": "model.safetensors", "encoding": "base64"}
        lines = [
            {"key": "header", "value": {"summary": "Upload", "parentCommit": parent}},
            {"key": "file", "value": file},
        ]
        return hub.commit_raw(b"\n".join(json.dumps(line).encode() for line in lines))

    second = onto(first, b"two").json()["commitOid"]
    answer = onto(first, b"three")
    assert error(answer) == (409, "upload_taken") and second in answer.json()["error"]
    assert hub.client.get(MODEL).json()["sha"] == second
    assert onto(second, b"four").status_code == 200  # what the hint says
    hub.rest()
    assert (hub.home.inbox / "german" / "model.safetensors").read_bytes() == b"four"


def test_a_training_that_goes_on_is_waited_for(hub: Hub) -> None:
    answer = hub.commit({"model.safetensors": b"1"}, summary="Training in progress, step 500")
    assert answer.json()["waits_seconds"] == 3600
    hub.rest(3500)
    assert hub.pushed() == []
    hub.commit({"model.safetensors": b"2"}, summary="Training in progress, step 1000")
    hub.rest(3500)
    assert hub.pushed() == []
    assert hub.commit({"model.safetensors": b"3"}, summary="End of training").json()["waits_seconds"] == 30
    hub.rest(31)
    assert (hub.home.inbox / "german" / "model.safetensors").read_bytes() == b"3"
    hub.commit({"model.safetensors": b"4"}, summary="Training in progress, step 500", name="broken-off")
    hub.rest(3601)
    assert "broken-off" in hub.pushed()


def test_the_other_shards_of_a_model_are_waited_for(hub: Hub) -> None:
    index = {"model.safetensors.index.json": b"{}"}
    first, second = ({f"model-0000{n}-of-00002.safetensors": b"%d" % n} for n in (1, 2))
    assert hub.commit(index | first).json()["waits_seconds"] == 3600
    hub.rest(3500)
    assert hub.pushed() == []
    assert hub.commit(second | {"last/model-00001-of-00001.safetensors": b""}).json()["waits_seconds"] == 30
    hub.rest(31)
    assert hub.pushed() == ["german"]
    hub.commit(first, name="never-ended")
    hub.rest(3601)  # and the inbox says what is missing
    assert "never-ended" in hub.pushed()


def test_what_has_no_weights_is_thrown_away_in_the_end(hub: Hub) -> None:
    for files in ({"README.md": b"#"}, {"training_args.bin": b"a", "tokenizer.json": b"t"}):
        assert hub.commit(files).json()["waits_seconds"] is None
        hub.rest(uploads.STALE_SECONDS - 10)
        assert hub.pushed() == [] and hub.left() != []
        hub.rest(11)
        assert hub.left() == []
    assert hub.commit({"pytorch_model.bin": b"a pickle"}).json()["waits_seconds"] == 30  # which is refused as a drop is


def test_a_file_that_is_not_what_it_was_to_be_is_thrown_away(hub: Hub) -> None:
    batch = {"operation": "upload", "objects": [{"oid": sha256(WEIGHTS), "size": len(WEIGHTS)}]}
    answer = hub.post("/mainstem/german.git/info/lfs/objects/batch", batch)
    href = answer.json()["objects"][0]["actions"]["upload"]["href"]
    assert error(hub.client.put(href, content=b"x" * len(WEIGHTS))) == (400, "upload_digest")
    assert error(hub.client.put(href, content=WEIGHTS[1:])) == (413, "upload_size")
    assert hub.left() == []
    for other in (
        href.replace("german", "french"),
        href.replace(sha256(WEIGHTS), sha256(b"")),
        href.replace(f"size={len(WEIGHTS)}", "size=1"),
        href.partition("&signature")[0],
        href.partition("?")[0],
    ):
        assert error(hub.client.put(other, content=WEIGHTS)) == (401, "unauthorised"), other
    assert hub.client.put(href, content=WEIGHTS).status_code == 200
    assert "actions" not in hub.post("/mainstem/german.git/info/lfs/objects/batch", batch).json()["objects"][0]


def test_an_address_is_signed_for_a_while(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pushing, "SIGNED_SECONDS", -1)
    assert error(hub.send({"a": b"a"})) == (401, "unauthorised")


def test_a_commit_that_fails_changes_nothing(hub: Hub) -> None:
    hub.commit({"model.safetensors": b"m"})
    before = hub.left()
    named = b'{"key": "lfsFile", "value": {"path": "b", "oid": "%s"}}\n' % (b"00" * 32)
    sent = b'{"key": "file", "value": {"content": "eA==", "path": "a", "encoding": "base64"}}\n'
    odd = sent.replace(b'"a"', b'"my file"')
    both = sent + sent.replace(b'"a"', b'"a/b"')
    for raw, wanted in (
        (sent + named, (409, "upload_unfinished")),
        (sent + b"{", (400, "bad_list")),
        (sent + odd, (400, "upload_name")),
        (sent.replace(b'"a"', b'"x/../../a"') + sent, (200, None)),  # hidden names do not count
        (both, (400, "upload_name")),
        (sent.replace(b'"a"', b'"%s"' % (b"a/" * 9 + b"a")), (400, "upload_name")),
    ):
        answer = hub.commit_raw(raw)
        assert (answer.status_code, answer.json().get("reason")) == wanted, raw
        if answer.status_code == 200:
            hub.commit(gone=("a",))
        assert hub.left() == before
    hub.rest()
    assert tree(hub.home.inbox / "german") == {"model.safetensors": b"m"}


def test_who_may_and_where_to(hub: Hub, line: "Line") -> None:
    for method, path in (
        ("GET", "/api/whoami-v2"),
        ("POST", "/api/repos/create"),
        ("POST", f"{MODEL}/preupload/main"),
        ("POST", f"{MODEL}/commit/main"),
        ("POST", "/mainstem/german.git/info/lfs/objects/batch"),
    ):
        answer = hub.client.request(method, path, headers={"Authorization": "Bearer hf_another-token"})
        assert error(answer) == (401, "unauthorised"), path
        assert answer.headers["x-error-message"] == "Invalid credentials in Authorization header"
    assert hub.client.get("/api/whoami-v2", headers=BEARER).json()["name"] == "mainstem"
    assert hub.client.post("/api/validate-yaml", json={"content": "# a card"}).json()["errors"] == []  # sent without
    for name in ("main", "init", "main-adapter"):
        for path in (f"/api/models/mainstem/{name}/preupload/main", f"/mainstem/{name}.git/info/lfs/objects/batch"):
            assert error(hub.post(path, {"files": [], "operation": "upload", "objects": []})) == (403, "upload_name")
        assert error(hub.commit_raw(b"", name)) == (403, "upload_name")
    for asked, wanted in (
        ({"name": "x", "organization": "somebody"}, 403),
        ({"name": "x", "type": "dataset"}, 400),
        ({"name": "main"}, 403),
        ({"name": ".x"}, 400),
        ({"name": "push.json"}, 400),
        ({"name": "ab" * 32}, 400),
        ([], 400),
        ({"name": "x", "organization": None, "private": True}, 200),
    ):
        assert hub.post("/api/repos/create", asked).status_code == wanted, asked
    for path in (f"{MODEL}/preupload/dev", f"{MODEL}/preupload/main?create_pr=1", f"{MODEL}/commit/dev"):
        assert error(hub.post(path, {"files": []})) == (400, "bad_query")
    assert error(hub.client.get(f"{MODEL}/xet-write-token/main")) == (404, "no_xet")


def test_a_repository_that_was_made_is_empty_and_not_unknown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "/mainstem/german/resolve/main/README.md"
    assert hub.client.get(address).headers["x-error-code"] == "RepoNotFound"
    hub.post("/api/repos/create", {"name": "german"})
    assert hub.client.get(address).headers["x-error-code"] == "EntryNotFound"
    assert hub.client.get(MODEL).json()["siblings"] == []
    hub.commit({"README.md": b"#", "runs/a": b"x"})
    answer = hub.client.get(address)
    assert answer.headers["x-error-code"] == "EntryNotFound" and "merged, and not read" in answer.json()["error"]
    rows = hub.client.get(f"{MODEL}/tree/main").json()
    assert [(row["type"], row["path"]) for row in rows] == [("file", "README.md"), ("directory", "runs")]
    monkeypatch.setattr(pushing, "MOST_MADE", 2)
    for n in range(3):
        hub.post("/api/repos/create", {"name": f"x{n}"})
    assert hub.client.get("/api/models/mainstem/x0").status_code == 404
    assert hub.client.get("/api/models/mainstem/x1").status_code == 200


def test_large_files_go_by_lfs_and_the_clients_are_told_of_xet(hub: Hub) -> None:
    large = {"path": "model.safetensors", "size": pushing.MOST_BYTES_IN_COMMIT + 1, "sample": ""}
    small = {"path": "config.json", "size": 5, "sample": ""}
    answer = hub.post(f"{MODEL}/preupload/main", {"files": [small, large, {"path": ".gitattributes", "size": 1}]})
    assert [(row["uploadMode"], row["shouldIgnore"]) for row in answer.json()["files"]] == [
        ("regular", False),
        ("lfs", False),
        ("regular", True),
    ]
    assert "HF_HUB_DISABLE_XET=1" in answer.headers["x-hf-warning"]
    assert "x-hf-warning" not in hub.post(f"{MODEL}/preupload/main", {"files": [small]}).headers


def test_the_one_before_it_may_still_lie_in_the_inbox(hub: Hub) -> None:
    hub.commit({"model.safetensors": b"1", "_READY": b""})
    assert hub.commit({"model.safetensors": b"2", "_READY": b""}).json()["in_inbox"] is False
    hub.rest()
    assert tree(hub.home.inbox / "german")["model.safetensors"] == b"1"
    durable.remove(hub.home.inbox / "german")
    hub.rest()
    assert tree(hub.home.inbox / "german")["model.safetensors"] == b"2"


def test_a_push_and_an_upload_do_not_mix(hub: Hub) -> None:
    hub.commit({"model.safetensors": b"1"})
    assert error(hub.put("/v1/experts/german/files/a.json")) == (409, "upload_taken")
    for method, path in (("POST", "/v1/experts/german/commit"), ("DELETE", "/v1/experts/german")):
        assert error(hub.client.request(method, path, headers=BEARER)) == (404, "upload_missing")
    hub.put("/v1/experts/french/files/a.json")
    assert error(hub.commit({"model.safetensors": b"1"}, name="french")) == (409, "upload_taken")
    assert error(hub.send({"a": b"a"}, "french")) == (409, "upload_taken")


def test_more_files_than_may_come_at_once_wait(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = [hub.uploads.begin(f"other{n}", "file", None) for n in range(uploads.AT_ONCE)]
    monkeypatch.setattr(pushing, "SLOT_SECONDS", 0)
    assert error(hub.send({"a": b"a"})) == (503, "upload_limit")
    monkeypatch.setattr(pushing, "SLOT_SECONDS", 60)
    threading.Timer(0.3, hub.uploads.drop, busy[:1]).start()
    assert hub.send({"a": b"a"}).status_code == 200
    monkeypatch.setattr(uploads, "MOST_FILES", 1)
    assert error(hub.send({"b": b"b"})) == (503, "upload_limit")  # at once: waiting would not help


def test_as_many_files_come_at_once_as_the_clients_send(hub: Hub) -> None:
    """Large ones take longer than any of them would wait."""
    for n in range(5):
        hub.uploads.begin("german", f"file{n}", None, pushed=True)


def again(home: Home) -> Uploads:
    """What a new process makes of what is there."""
    fresh = Uploads(home, Http.model_validate({"write_token": TOKEN, "push_quiet_seconds": 0}))
    fresh.resume()
    return fresh


def test_what_was_committed_outlives_the_process_and_nothing_else(hub: Hub) -> None:
    hub.commit({"config.json": b"{}"}, {"model.safetensors": WEIGHTS})
    hub.send({"next": b"not committed yet"})
    hub.send({"a": b"never committed"}, "other")
    hub.put("/v1/experts/folder/files/a.json")
    with Store.open(hub.home.registry) as store:
        recover(hub.home, store, lambda *_, **__: None)
    assert {path.name for path in hub.home.uploads.iterdir()} == {"german"}
    again(hub.home).tend()
    assert tree(hub.home.inbox / "german") == {"config.json": b"{}", "model.safetensors": WEIGHTS}
    assert list(hub.home.uploads.iterdir()) == []


class Killed(BaseException):
    """The process ends here."""


def test_killed_at_any_step_it_enters_once(line: "Line", monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change to the disk between a commit and the inbox is the last one of a process, in turn."""
    home, wanted = line.home, {"config.json": b"{}", "model.safetensors": b"m", "checkpoint-1/model.safetensors": b"m"}
    for step in range(1, 200):
        before = again(home)
        for name, data in (("small", b"{}"), ("large", b"m")):
            incoming = before.begin("german", name, len(data), pushed=True)
            incoming.write(data)
            before.finish(incoming, set())
        named = {"config.json": "small", "model.safetensors": "large", "checkpoint-1/model.safetensors": "large"}
        before.record("german", named, [], "Upload model")
        left = step

        def hit(name: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed(name)

        with monkeypatch.context() as patch:
            patch.setattr(durable, "hit", hit)
            with suppress(Killed):
                before.tend()
        for _ in range(2):
            again(home).tend()
        found = {name: data for name, data in tree(home.inbox / "german").items() if data != "folder"}
        assert (found, list(home.uploads.iterdir())) == (wanted, []), step
        durable.remove(home.inbox / "german")
        if left > 0:
            break
    assert 8 < step < 199


def test_a_failing_disk_leaves_it_where_it_is(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.commit({"model.safetensors": b"m", "config.json": b"{}"})
    linked: list[str] = []

    def full(source: Path, target: Path, link: Callable[[Path, Path], None] = durable.link_or_copy) -> None:
        linked.append(target.name)
        if len(linked) == 2:
            raise OSError(28, "No space left on device")
        link(source, target)

    monkeypatch.setattr(pushes.durable, "link_or_copy", full)
    hub.rest()
    assert hub.pushed() == [] and hub.uploads.failing
    hub.rest(1)
    assert tree(hub.home.inbox / "german") == {"model.safetensors": b"m", "config.json": b"{}"}


@pytest.mark.parametrize("syncing", [False, True])
def test_a_commit_that_could_not_be_stored_was_none(hub: Hub, monkeypatch: pytest.MonkeyPatch, syncing: bool) -> None:
    hub.commit({"model.safetensors": b"1"})
    before = tree(hub.home.uploads)
    failure = SyncFailed(5, "Input/output error") if syncing else OSError(28, "No space left on device")

    def fail(path: Path, data: bytes) -> None:
        if syncing:  # the new one may be there
            path.write_bytes(data)
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(uploads.durable, "replace_file", fail)
        answer = hub.commit({"model.safetensors": b"2", "config.json": b"{}"})
    if not syncing:
        assert error(answer) == (507, "upload_space") and tree(hub.home.uploads) == before
        assert hub.client.get(MODEL).json()["siblings"] == [{"rfilename": "model.safetensors"}]
        hub.rest()
        assert tree(hub.home.inbox / "german") == {"model.safetensors": b"1"}
        return
    assert answer.status_code == 500
    with pytest.raises(SyncFailed):  # the process ends; the next one finds what that commit named
        hub.uploads.tend()
    again(hub.home).tend()
    assert tree(hub.home.inbox / "german") == {"model.safetensors": b"2", "config.json": b"{}"}


def test_nothing_changes_in_the_inbox_once_it_is_there(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that loses its other name there has changed, and is waited for again."""
    links: list[int] = []

    def enter(folder: Folder, name: str, target: Folder, move: Any = Folder.move_new) -> None:
        links.extend(path.stat().st_nlink for path in (hub.home.uploads / name / name).iterdir())
        move(folder, name, target)

    monkeypatch.setattr(Folder, "move_new", enter)
    hub.commit({"model.safetensors": b"m", "config.json": b"{}", "_READY": b""})
    assert links == [1, 1, 1] and hub.pushed() == ["german"]
