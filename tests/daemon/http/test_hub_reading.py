"""The Hub's protocol, read: what its clients rely on. The clients themselves are in test_hub_clients.py."""

import json
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from daemon.config import Settings
from daemon.http import create_app
from daemon.http.hub import reading
from daemon.layout import MANIFEST
from registry.reader import Reader
from tests.daemon.http.conftest import sha256

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

MODEL = "/api/models/mainstem/main"


def commit(line: "Line", n: int, head: str = "main") -> str:
    return sha256((line.home.version(head, n) / MANIFEST).read_bytes())[:40]


def reason(answer: httpx.Response) -> tuple[int, str | None, str]:
    return answer.status_code, answer.headers.get("x-error-code"), answer.json()["reason"]


@pytest.fixture
def two(line: "Line") -> "Line":
    line.publish(b"one" * 100)
    line.publish(b"two" * 100)
    return line


def test_a_model_and_its_revisions(two: "Line", client: httpx.Client) -> None:
    for revision, n in (
        ("main", 2),
        ("latest", 2),
        ("refs%2Fheads%2Fmain", 2),
        ("v2", 2),
        ("2", 2),
        ("v1", 1),
        ("refs%2Ftags%2Fv1", 1),
        ("000001", 1),
        (commit(two, 0), 0),
    ):
        answer = client.get(f"{MODEL}/revision/{revision}")
        assert (answer.status_code, answer.json()["sha"]) == (200, commit(two, n)), revision
    found = client.get(MODEL, params={"blobs": "true"}).json()
    assert (found["id"], found["sha"], found["private"]) == ("mainstem/main", commit(two, 2), False)
    data = two.home.version("main", 2) / "model.safetensors"
    (weights,) = [one for one in found["siblings"] if one["rfilename"] == data.name]
    assert (weights["size"], weights["lfs"]["oid"]) == (300, sha256(data.read_bytes()))
    assert commit(two, 2, "init") == client.get("/api/models/mainstem/init").json()["sha"] != commit(two, 2)
    every = {one["id"]: one["sha"] for one in client.get("/api/models", params={"author": "mainstem"}).json()}
    assert every == {"mainstem/main": commit(two, 2), "mainstem/init": commit(two, 2, "init")}
    assert client.get(f"{MODEL}/auth-check").status_code == 200
    assert reason(client.get("/api/models/mainstem/other/auth-check")) == (404, "RepoNotFound", "unknown_head")
    refs = client.get(f"{MODEL}/refs").json()
    assert [one["targetCommit"] for one in refs["branches"]] == [commit(two, 2)]
    assert {one["name"]: one["targetCommit"] for one in refs["tags"]} == {f"v{n}": commit(two, n) for n in range(3)}


def test_the_files_of_a_commit_are_those_of_the_version(two: "Line", client: httpx.Client) -> None:
    data = (two.home.version("main", 1) / "model.safetensors").read_bytes()
    address = f"/mainstem/main/resolve/{commit(two, 1)}/model.safetensors"
    head = client.head(address)
    assert (head.status_code, head.headers["x-repo-commit"]) == (200, commit(two, 1))
    assert (head.headers["x-linked-etag"], head.headers["x-linked-size"]) == (f'"{sha256(data)}"', "300")
    assert head.headers["content-length"] == "300" and "immutable" in head.headers["cache-control"]
    assert client.get(address).content == data == client.get(address.replace(commit(two, 1), "v1")).content
    part = client.get(address, headers={"Range": "bytes=100-", "If-Range": head.headers["etag"]})
    assert (part.status_code, part.content) == (206, data[100:])
    assert client.get(address, headers={"If-None-Match": head.headers["etag"]}).status_code == 304


def test_main_leads_to_the_commit_that_it_is(two: "Line", client: httpx.Client) -> None:
    for method in ("HEAD", "GET"):
        answer = client.request(method, "/mainstem/main/resolve/main/model.safetensors")
        assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-cache")
        assert answer.headers["location"] == f"/mainstem/main/resolve/{commit(two, 2)}/model.safetensors"
        assert (answer.headers["x-repo-commit"], answer.headers["x-linked-size"]) == (commit(two, 2), "300")
    before = answer.headers["location"]
    two.publish(b"three" * 60)  # of the same size: nothing but the address tells them apart
    assert client.get(before).content == b"two" * 100
    assert commit(two, 3) in client.head("/mainstem/main/resolve/main/model.safetensors").headers["location"]


def test_a_tree_with_folders(line: "Line", client: httpx.Client) -> None:
    restate(line, {"1_Pooling/config.json": b"{}", "config.json": b"{ }"})
    flat = client.get(f"{MODEL}/tree/main").json()
    assert [(one["type"], one["path"]) for one in flat] == [("directory", "1_Pooling"), ("file", "config.json")]
    every = client.get(f"{MODEL}/tree/main", params={"recursive": "True"}).json()
    assert [one["path"] for one in every] == ["1_Pooling", "1_Pooling/config.json", "config.json"]
    assert [one["path"] for one in client.get(f"{MODEL}/tree/main/1_Pooling").json()] == ["1_Pooling/config.json"]
    assert reason(client.get(f"{MODEL}/tree/main/2_Dense")) == (404, "EntryNotFound", "unknown_file")
    answer = client.get("/mainstem/main/resolve/main/1_Pooling/config.json", follow_redirects=True)
    assert (answer.content, len(answer.history)) == (b"{}", 1)
    for ask in ({"data": {"paths": ["config.json", "gone"]}}, {"json": {"paths": ["config.json", "gone"]}}):
        found = client.post(f"{MODEL}/paths-info/main", **ask)  # type: ignore[arg-type]
        assert [(one["path"], one["size"]) for one in found.json()] == [("config.json", 3)]


def restate(line: "Line", files: dict[str, bytes]) -> None:
    """Makes version 0 of main one of these files."""
    listed = [{"name": name, "size": len(content), "sha256": sha256(content)} for name, content in files.items()]
    manifest = json.dumps({"format": 1, "head": "main", "version": 0, "files": listed}).encode()
    for name, content in {**files, MANIFEST: manifest}.items():
        path = line.home.version("main", 0) / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with closing(sqlite3.connect(line.home.registry)) as database, database:
        database.execute("UPDATE versions SET manifest_sha256 = ? WHERE head = 'main'", [sha256(manifest)])


def test_an_adapter_is_a_repository_of_its_own(line: "Line", client: httpx.Client) -> None:
    assert reason(client.get("/api/models/mainstem/main-adapter")) == (404, "RevisionNotFound", "no_adapter")
    restate(line, {"adapter/adapter_config.json": b'{"r": 4}', "config.json": b"{}"})
    found = client.get("/api/models/mainstem/main-adapter").json()
    assert [one["rfilename"] for one in found["siblings"]] == ["adapter_config.json"]
    assert [one["rfilename"] for one in client.get(MODEL).json()["siblings"]] == ["config.json"]
    address = "/mainstem/main-adapter/resolve/main/adapter_config.json"
    assert client.get(address, follow_redirects=True).json() == {"r": 4}


def test_what_is_not_there_is_told_in_the_hubs_words(two: "Line", client: httpx.Client) -> None:
    for address, code, why in (
        ("/mainstem/main/resolve/main/none.txt", "EntryNotFound", "unknown_file"),
        ("/mainstem/main/resolve/main/manifest.json", "EntryNotFound", "unknown_file"),
        ("/mainstem/main/resolve/main/..%2f000001%2fconfig.json", "EntryNotFound", "unknown_file"),
        ("/mainstem/main/resolve/v9/config.json", "RevisionNotFound", "unknown_version"),
        (f"/mainstem/main/resolve/{'0' * 40}/config.json", "RevisionNotFound", "unknown_version"),
        (f"/mainstem/init/resolve/{commit(two, 1)}/config.json", "RevisionNotFound", "unknown_version"),
        ("/mainstem/other/resolve/main/config.json", "RepoNotFound", "unknown_head"),
        ("/mainstem/other-adapter/resolve/main/config.json", "RepoNotFound", "unknown_head"),
        ("/bert-base-uncased/resolve/main/config.json", "RepoNotFound", "unknown_head"),
        ("/google-bert/bert/resolve/main/config.json", "RepoNotFound", "unknown_head"),
        ("/api/models/google-bert/bert", "RepoNotFound", "unknown_head"),
        ("/api/models/google-bert/bert/tree/main", "RepoNotFound", "unknown_head"),
        ("/api/models/mainstem/other/commits/main", "RepoNotFound", "unknown_head"),
        ("/api/datasets/imdb", "RepoNotFound", "unknown_head"),
        (f"{MODEL}/revision/refs%2Fpr%2F1", "RevisionNotFound", "unknown_version"),
        ("/mainstem/main/resolve/refs%2Ftags%2Fv9/config.json", "RevisionNotFound", "unknown_version"),
        (f"{MODEL}/commits/main", "not_found", "not_found"),
        (f"{MODEL}/discussions", "not_found", "not_found"),
    ):
        answer = client.get(address)
        assert reason(answer) == (404, code, why), address
        assert answer.json()["hint"] in answer.headers["x-error-message"]
        assert client.head(address).headers["x-error-code"] == code
    missing = client.head("/mainstem/main/resolve/main/none.txt")
    assert missing.headers["x-repo-commit"] == commit(two, 2)


def test_what_the_hub_would_change_is_told_to_be_fixed_here(two: "Line", client: httpx.Client) -> None:
    for method, address in (
        ("POST", f"{MODEL}/tag/v1"),
        ("DELETE", f"{MODEL}/branch/dev"),
        ("PUT", f"{MODEL}/settings"),
        ("DELETE", "/api/repos/delete"),
        ("POST", "/api/repos/move"),
    ):
        answer = client.request(method, address, content=b"{}")
        assert reason(answer) == (405, "read_only", "read_only"), address
        assert "nothing of the kind" in answer.headers["x-error-message"] and answer.headers["allow"] == "GET, HEAD"


def test_a_collected_version_is_a_revision_no_more(two: "Line", client: httpx.Client) -> None:
    before = commit(two, 1)
    two.store.collected("main", 1)
    for revision in ("v1", before):
        answer = client.get(f"/mainstem/main/resolve/{revision}/config.json")
        assert reason(answer) == (410, "RevisionNotFound", "collected")
    assert [one["name"] for one in client.get(f"{MODEL}/refs").json()["tags"]] == ["v2", "v0"]


def test_no_other_address_is_shadowed(
    two: "Line", client: httpx.Client, raw: Callable[..., tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert client.get("/v1/heads/main/versions/1/files/config.json").status_code == 200
    for address in ("/v1/none", "/api/none", "/mainstem/main", "/metrics/none"):
        assert client.get(address).json()["reason"] == "not_found", address
    assert client.put("/mainstem/main/resolve/main/config.json", content=b"x").status_code == 405
    assert client.post(f"{MODEL}/paths-info/main", content=b"x" * (2 << 20)).status_code == 413
    host, port = client.base_url.host, client.base_url.port
    head = f"POST {MODEL}/paths-info/main HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\npath".encode()
    monkeypatch.setattr(reading, "PATHS_SECONDS", 0.2)
    with socket.create_connection((host, port or 80), timeout=20) as connection:
        connection.sendall(head)
        assert b" 408 " in connection.recv(1000)
    for body in (b"paths", b"\xff", b"["):
        kind = "application/json" if body == b"[" else "application/x-www-form-urlencoded"
        answer = client.post(f"{MODEL}/paths-info/main", content=body, headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["reason"]) == (400, "bad_query"), body
    assert raw(b"/mainstem/%ff/resolve/main/x")[0] == 404


def test_behind_a_proxy_the_way_leads_through_it(two: "Line") -> None:
    with Reader.open(two.home.registry) as reader:
        settings = Settings.model_validate({"http": {"trusted_proxies": ("*",)}})
        app = create_app(two.home, reader, CollectorRegistry(), lambda: None, settings=lambda: settings)
        at = "http://localhost"
        with TestClient(app, at, follow_redirects=False, client=("127.0.0.1", 1)) as client:
            headers = {"X-Forwarded-Prefix": "/merger"}
            answer = client.get("/mainstem/main/resolve/main/config.json", headers=headers)
    assert answer.headers["location"] == f"/merger/mainstem/main/resolve/{commit(two, 2)}/config.json"
