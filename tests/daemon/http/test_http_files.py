"""Every body is the bytes of exactly one committed version: ranges, tags, hostile names, damage."""

import base64
import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import quote

import httpx
import pytest

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

FILE = "/v1/heads/main/versions/1/files/model.safetensors"
DATA = bytes(range(256)) * 300


@pytest.fixture
def one(line: "Line") -> "Line":
    line.publish(DATA)
    return line


def test_a_file_comes_whole_with_its_digest(one: "Line", client: httpx.Client) -> None:
    answer = client.get(FILE)
    digest = hashlib.sha256(DATA)
    assert answer.status_code == 200
    assert answer.content == DATA
    assert answer.headers["etag"] == f'"sha256:{digest.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    assert answer.headers["cache-control"] == "public, max-age=31536000, immutable"
    assert answer.headers["accept-ranges"] == "bytes"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-length"] == str(len(DATA))


def test_json_files_say_so(one: "Line", client: httpx.Client) -> None:
    answer = client.get("/v1/heads/main/versions/1/files/config.json")
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {"model_type": "tiny"}


def test_head_has_the_headers_and_no_body(one: "Line", client: httpx.Client) -> None:
    head, get = client.head(FILE), client.get(FILE)
    assert head.status_code == 200
    assert head.content == b""
    for name in ("etag", "content-length", "repr-digest", "content-type", "accept-ranges"):
        assert head.headers[name] == get.headers[name]


@pytest.mark.parametrize(
    ("asked", "first", "end"),
    [("bytes=0-0", 0, 1), ("bytes=100-199", 100, 200), ("bytes=76000-", 76000, None), ("bytes=-5", -5, None)],
)
def test_a_range(one: "Line", client: httpx.Client, asked: str, first: int, end: int | None) -> None:
    answer = client.get(FILE, headers={"Range": asked})
    assert answer.status_code == 206
    assert answer.content == DATA[first:end]
    start = first % len(DATA)
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(answer.content) - 1}/{len(DATA)}"


def test_several_ranges(one: "Line", client: httpx.Client) -> None:
    answer = client.get(FILE, headers={"Range": "bytes=0-9,50000-50004"})
    assert answer.status_code == 206
    boundary = answer.headers["content-type"].removeprefix("multipart/byteranges; boundary=").encode()
    parts = [part.partition(b"\r\n\r\n")[2][:-2] for part in answer.content.split(b"--" + boundary)[1:-1]]
    assert parts == [DATA[:10], DATA[50000:50005]]


def test_a_thousand_ranges_cost_one_whole_file(one: "Line", client: httpx.Client) -> None:
    many = ",".join(f"{2 * i}-{2 * i}" for i in range(1000))
    answer = client.get(FILE, headers={"Range": f"bytes={many}"})
    assert answer.status_code == 200
    assert answer.content == DATA


def test_a_range_beyond_the_end(one: "Line", client: httpx.Client) -> None:
    answer = client.get(FILE, headers={"Range": f"bytes={len(DATA)}-"})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


def test_an_unknown_unit_is_ignored(one: "Line", client: httpx.Client) -> None:
    assert client.get(FILE, headers={"Range": "tensors=0-1"}).content == DATA


def test_if_range_continues_only_the_same_version(one: "Line", client: httpx.Client) -> None:
    tag = client.head(FILE).headers["etag"]
    one.publish(DATA[::-1])
    resumed = client.get(FILE, headers={"Range": "bytes=1000-", "If-Range": tag})
    assert (resumed.status_code, resumed.content) == (206, DATA[1000:])
    other = client.get(FILE.replace("/1/", "/2/"), headers={"Range": "bytes=1000-", "If-Range": tag})
    assert (other.status_code, other.content) == (200, DATA[::-1])


def test_if_range_with_a_date_is_not_trusted(one: "Line", client: httpx.Client) -> None:
    # Both versions were written within the same second: their dates are equal.
    one.publish(DATA[::-1])
    for n in (1, 2):
        os.utime(one.home.version("main", n) / "model.safetensors", (1_700_000_000, 1_700_000_000))
    date = client.head(FILE).headers["last-modified"]
    other = client.get(FILE.replace("/1/", "/2/"), headers={"Range": "bytes=1000-", "If-Range": date})
    assert (other.status_code, other.content) == (200, DATA[::-1])


def test_if_none_match(one: "Line", client: httpx.Client) -> None:
    tag = client.head(FILE).headers["etag"]
    for asked in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        answer = client.get(FILE, headers={"If-None-Match": asked})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag), asked
    for asked in ('"other"', tag.strip('"'), '"*"'):
        assert client.get(FILE, headers={"If-None-Match": asked}).status_code == 200, asked


def test_the_manifest_is_sent_byte_for_byte(one: "Line", client: httpx.Client) -> None:
    path = "/v1/heads/main/versions/1"
    answer = client.get(path)
    raw = one.home.manifest("main", 1).read_bytes()
    assert answer.content == raw
    assert answer.headers["etag"] == f'"sha256:{hashlib.sha256(raw).hexdigest()}"'
    assert "immutable" in answer.headers["cache-control"]
    assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).status_code == 304


def test_only_listed_files_exist(one: "Line", client: httpx.Client) -> None:
    (one.home.version("main", 1) / "notes.txt").write_text("not in the manifest")
    for name in ("notes.txt", "manifest.json", "nothing"):
        answer = client.get(f"/v1/heads/main/versions/1/files/{name}")
        assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_file")


def test_a_folder_without_a_row_is_not_there(one: "Line", client: httpx.Client) -> None:
    shutil.copytree(one.home.version("main", 1), one.home.version("main", 2))
    for path in ("", "/files/model.safetensors"):
        answer = client.get("/v1/heads/main/versions/2" + path)
        assert (answer.status_code, answer.json()["reason"]) == (404, "unknown_version")


def test_hostile_paths_find_nothing(one: "Line", raw: Callable[..., tuple[int, bytes]]) -> None:
    (one.home.root / "secret").write_bytes(b"SECRET")
    base = b"/v1/heads/main/versions/1/files/"
    up = [b"../" * depth + b"secret" for depth in range(1, 9)]
    names = [
        *up,
        *(name.replace(b".", b"%2e") for name in up),
        *(name.replace(b"/", b"%2f") for name in up),
        *(name.replace(b"/", b"%252f") for name in up),
        *(name.replace(b"/", b"\\") for name in up),
        b"model.safetensors%00.json",
        b"%00",
        b"..",
        b".",
        b"%2e%2e",
        b"/etc/passwd",
        b"%2fetc%2fpasswd",
        b"%ff%fe",
        b"a" * 8000,
    ]
    heads = [b"/v1/heads/%2e%2e%2fmain/versions/1", b"/v1/heads/../latest", b"/v1/heads/%00/latest"]
    numbers = [b"-1", b"1e3", b"%31%00", b"9" * 5000, b"9" * 12, b"1%2f..%2f1", "٣".encode(), b"1.0", b"+1", b"%201"]
    for target in [base + name for name in names] + heads + [b"/v1/heads/main/versions/" + n for n in numbers]:
        status, body = raw(target)
        assert status in (400, 404), (target[:80], status)
        assert b"SECRET" not in body
        assert b"root:" not in body


def test_a_symbolic_link_is_not_followed(one: "Line", client: httpx.Client) -> None:
    weights = one.home.version("main", 1) / "model.safetensors"
    elsewhere = one.home.root / "elsewhere"
    weights.rename(elsewhere)
    weights.symlink_to(elsewhere)
    answer = client.get(FILE)
    assert (answer.status_code, answer.json()["reason"]) == (500, "damaged")
    assert "verify" in answer.json()["hint"]


def test_a_fifo_does_not_hang(one: "Line", client: httpx.Client) -> None:
    weights = one.home.version("main", 1) / "model.safetensors"
    weights.unlink()
    os.mkfifo(weights)
    assert client.get(FILE, timeout=5).status_code == 500


def test_damage_is_told_and_never_sent(one: "Line", client: httpx.Client) -> None:
    weights = one.home.version("main", 1) / "model.safetensors"
    weights.write_bytes(DATA[:-1])
    assert client.get(FILE).json()["reason"] == "damaged"
    one.publish(b"second")
    manifest = one.home.manifest("main", 2)
    manifest.write_bytes(manifest.read_bytes().replace(b"model.safe", b"nodel.safe"))
    assert client.get("/v1/heads/main/versions/2").json()["reason"] == "damaged"
    one.home.manifest("main", 2).unlink()
    answer = client.get("/v1/heads/main/versions/2")
    assert (answer.status_code, answer.json()["reason"]) == (500, "damaged")


def test_the_newest_file_is_a_redirect_away(line: "Line", client: httpx.Client) -> None:
    for weights in (b"one", b"two"):
        line.publish(weights)
        for method in ("GET", "HEAD"):
            answer = client.request(method, "/v1/heads/main/latest/files/model.safetensors")
            assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-cache")
            followed = client.request(method, "/v1/heads/main/latest/files/model.safetensors", follow_redirects=True)
            assert followed.headers["etag"] == f'"sha256:{hashlib.sha256(weights).hexdigest()}"'
            assert followed.content == (weights if method == "GET" else b"")
    part = client.get(
        "/v1/heads/main/latest/files/model.safetensors", headers={"Range": "bytes=1-1"}, follow_redirects=True
    )
    assert (part.status_code, part.content) == (206, b"w")


def test_only_a_file_that_is_there_is_redirected_to(line: "Line", client: httpx.Client) -> None:
    line.publish(b"one")
    for name in ("nothing", "manifest.json", "../manifest.json", "%2e%2e/1/model.safetensors", "", "a%00b", "a/b/c"):
        answer = client.get(f"/v1/heads/main/latest/files/{name}")
        assert (answer.status_code, "location" in answer.headers) == (404, False), name
    assert client.get("/v1/heads/nothing/latest/files/model.safetensors").json()["reason"] == "unknown_head"


@pytest.mark.parametrize(
    "name", ["adapter/deep er/a?b#c%41.safetensors", "latest/files/x", "http:/evil.example/x", "a:b"]
)
def test_the_newest_nested_file_with_an_odd_name(line: "Line", client: httpx.Client, name: str) -> None:
    version = line.home.version("main", 0)
    (version / name).parent.mkdir(parents=True, exist_ok=True)
    (version / name).write_bytes(b"nested")
    manifest = json.loads((version / "manifest.json").read_bytes())
    manifest["files"].append({"name": name, "size": 6, "sha256": hashlib.sha256(b"nested").hexdigest()})
    raw = json.dumps(manifest).encode()
    (version / "manifest.json").write_bytes(raw)
    with sqlite3.connect(line.home.registry) as registry:
        registry.execute(
            "UPDATE versions SET manifest_sha256 = ? WHERE head = 'main' AND number = 0",
            (hashlib.sha256(raw).hexdigest(),),
        )
    for written in (quote(name), quote(name, safe="")):
        answer = client.get(f"/v1/heads/main/latest/files/{written}", follow_redirects=True)
        assert (answer.status_code, answer.content) == (200, b"nested"), answer.url
