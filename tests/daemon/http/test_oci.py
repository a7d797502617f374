"""A home as an OCI registry: by its protocol, and by the real oras client."""

import json
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from daemon.http.oci import finding
from daemon.http.oci.artifacts import MANIFEST_TYPE, Artifact
from daemon.layout import MANIFEST
from daemon.manifest import Manifest
from tests.daemon.http.conftest import CONFIG, sha256
from tests.daemon.http.test_hub_reading import restate

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

MAIN = "/v2/mainstem/main"
NONE = f"sha256:{'0' * 64}"
PULL = """
import sys
from oras.client import OrasClient
OrasClient(insecure=True).pull(sys.argv[1], outdir=sys.argv[2])
"""


@pytest.fixture
def two(line: "Line") -> "Line":
    line.publish(b"one" * 100)
    line.publish(b"two" * 100)
    return line


def digest(client: httpx.Client, tag: str, repo: str = "main") -> str:
    found: str = client.head(f"/v2/mainstem/{repo}/manifests/{tag}").headers["docker-content-digest"]
    return found


def error(answer: httpx.Response) -> tuple[int, str, str]:
    (one,) = answer.json()["errors"]
    assert one["message"] and one["detail"]["hint"]
    return answer.status_code, one["code"], one["detail"]["reason"]


def test_the_same_version_is_the_same_artifact_for_ever() -> None:
    listed = [
        {"name": name, "size": n, "sha256": f"{n}" * 64}
        for n, name in enumerate(("README.md", "1_Pooling/config.json", "model.safetensors", "model.py"), 1)
    ]
    raw = json.dumps({"version": 12, "created_at": "2026-03-01T12:00:00+00:00", "files": listed}).encode()
    version = Manifest.read(raw)
    made = Artifact.of("mainstem/main", version, version.files)
    assert made.config_sha256 == "a0a841760958b35170b17d13224343da33692ce188b0332ad99573108a76db08"
    assert (
        made.sha256 == "5c9d126078bad88ce70ff5b2b774a519b38f02eea251e6017ff87f127ed08a68"
    )  # others have pinned it: never change what comes of a version
    kinds = [
        layer["mediaType"].removeprefix("application/vnd.cncf.model.") for layer in json.loads(made.manifest)["layers"]
    ]
    assert kinds == ["doc.v1.raw", "weight.config.v1.raw", "weight.v1.raw", "code.v1.raw"]


def test_an_artifact_is_the_files_of_its_version(two: "Line", client: httpx.Client) -> None:
    assert client.get("/v2/").status_code == 200
    answer = client.get(f"{MAIN}/manifests/latest")
    found = answer.json()
    assert answer.headers["content-type"] == found["mediaType"] == MANIFEST_TYPE
    assert answer.headers["docker-content-digest"] == f"sha256:{sha256(answer.content)}"
    assert answer.headers["cache-control"] == "no-cache"
    pinned = client.get(f"{MAIN}/manifests/{digest(client, 'v2')}")
    assert pinned.content == answer.content and "immutable" in pinned.headers["cache-control"]
    for one in (found["config"], *found["layers"]):
        blob = client.get(f"{MAIN}/blobs/{one['digest']}")
        assert (f"sha256:{sha256(blob.content)}", len(blob.content)) == (one["digest"], one["size"])
        assert blob.headers["docker-content-digest"] == one["digest"]
        head = client.head(f"{MAIN}/blobs/{one['digest']}")
        assert (head.status_code, head.headers["content-length"]) == (200, str(one["size"]))
    weights = found["layers"][1]
    assert weights["annotations"]["org.cncf.model.filepath"] == "model.safetensors"
    part = client.get(f"{MAIN}/blobs/{weights['digest']}", headers={"Range": "bytes=290-"})
    assert (part.status_code, part.content) == (206, (b"two" * 100)[290:])
    config = client.get(f"{MAIN}/blobs/{found['config']['digest']}").json()
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in found["layers"]]
    assert config["descriptor"]["revision"] == sha256((two.home.version("main", 2) / MANIFEST).read_bytes())
    held = {"If-None-Match": answer.headers["etag"]}
    same = client.get(f"{MAIN}/manifests/latest", headers=held)
    assert (same.status_code, same.headers["cache-control"]) == (304, "no-cache")
    two.publish(b"three" * 60)
    assert client.get(f"{MAIN}/manifests/latest", headers=held).status_code == 200
    assert client.get(f"{MAIN}/manifests/{digest(client, 'v2')}").content == answer.content


def test_tags_come_in_pages(two: "Line", client: httpx.Client) -> None:
    for n in range(3, 12):
        two.publish(b"%04d" % n)
    two.store.collected("main", 3)
    every = sorted(["latest", *(f"v{n}" for n in range(12) if n != 3)])
    assert client.get(f"{MAIN}/tags/list").json() == {"name": "mainstem/main", "tags": every}
    found, address = [], f"{MAIN}/tags/list?n=5"
    while address:
        answer = client.get(address)
        found += answer.json()["tags"]
        address = answer.links.get("next", {}).get("url", "")
    assert found == every
    assert client.get(f"{MAIN}/tags/list?last=v8").json()["tags"] == ["v9"]
    assert client.get(f"{MAIN}/tags/list?n=0").json()["tags"] == []
    assert error(client.get(f"{MAIN}/tags/list?n=-1")) == (400, "UNSUPPORTED", "bad_query")


def test_an_adapter_is_a_repository_of_its_own(line: "Line", client: httpx.Client) -> None:
    address = "/v2/mainstem/main-adapter"
    assert error(client.get(f"{address}/manifests/latest")) == (404, "MANIFEST_UNKNOWN", "no_adapter")
    assert client.get(f"{address}/tags/list").json()["tags"] == []
    restate(line, {"adapter/adapter_config.json": b'{"r": 4}', "config.json": b"{}"})
    assert client.get(f"{address}/tags/list").json()["tags"] == ["latest", "v0"]
    (layer,) = client.get(f"{address}/manifests/v0").json()["layers"]
    assert layer["annotations"]["org.opencontainers.image.title"] == "adapter_config.json"
    assert client.get(f"{address}/blobs/{layer['digest']}").json() == {"r": 4}
    assert error(client.get(f"{MAIN}/blobs/{layer['digest']}")) == (404, "BLOB_UNKNOWN", "unknown_blob")


def test_what_is_not_there_is_told_in_ocis_words(two: "Line", client: httpx.Client) -> None:
    other = f"sha256:{sha256(CONFIG)}"
    gone = digest(client, "v1")
    two.store.collected("main", 1)
    for address, *expected in (
        (f"{MAIN}/manifests/v9", 404, "MANIFEST_UNKNOWN", "unknown_version"),
        (f"{MAIN}/manifests/v1", 404, "MANIFEST_UNKNOWN", "collected"),
        (f"{MAIN}/manifests/{gone}", 404, "MANIFEST_UNKNOWN", "unknown_manifest"),
        (f"{MAIN}/manifests/v02", 404, "MANIFEST_UNKNOWN", "unknown_version"),
        (f"{MAIN}/manifests/{NONE}", 404, "MANIFEST_UNKNOWN", "unknown_manifest"),
        (f"{MAIN}/manifests/sha512:0", 400, "DIGEST_INVALID", "bad_digest"),
        (f"{MAIN}/blobs/{NONE}", 404, "BLOB_UNKNOWN", "unknown_blob"),
        (f"{MAIN}/blobs/sha256:{sha256(b'one' * 100)}", 404, "BLOB_UNKNOWN", "unknown_blob"),
        (f"{MAIN}/blobs/..%2fconfig.json", 404, "UNSUPPORTED", "not_found"),
        (f"/v2/mainstem/other/blobs/{other}", 404, "NAME_UNKNOWN", "unknown_head"),
        ("/v2/mainstem/other/tags/list", 404, "NAME_UNKNOWN", "unknown_head"),
        ("/v2/library/busybox/manifests/latest", 404, "NAME_UNKNOWN", "unknown_head"),
        (f"{MAIN}/referrers/{gone}", 404, "UNSUPPORTED", "not_found"),
    ):
        assert error(client.get(address)) == tuple(expected), address
        assert client.head(address).status_code == expected[0]
    for kinds, status in (
        ("application/vnd.docker.distribution.manifest.v2+json", 404),
        (f"x/y, {MANIFEST_TYPE}", 200),
    ):
        assert client.get(f"{MAIN}/manifests/v2", headers={"Accept": kinds}).status_code == status
    for method, address in (
        ("POST", f"{MAIN}/blobs/uploads/"),
        ("PUT", f"{MAIN}/manifests/v9"),
        ("DELETE", f"{MAIN}/blobs/{other}"),
    ):
        answer = client.request(method, address, content=b"x")
        assert error(answer) == (405, "UNSUPPORTED", "read_only")
        assert answer.headers["allow"] == "GET, HEAD"


def test_a_digest_is_looked_for_among_so_many(
    two: "Line", client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(3, 9):
        two.publish(b"%04d" % n)
    monkeypatch.setattr(finding, "MOST_SEARCHED", 2)
    monkeypatch.setattr(finding, "PAGE", 2)
    assert client.get(f"{MAIN}/tags/list").json()["tags"] == ["latest", "v7", "v8"]
    old = f"{MAIN}/blobs/sha256:{sha256(b'one' * 100)}"
    assert client.get(old).status_code == 404
    asked = digest(client, "v1")  # whoever pulls an old one by its tag gets its files
    assert client.get(old).content == b"one" * 100
    assert client.get(f"{MAIN}/manifests/{asked}").status_code == 200
    two.publish(b"damaged")
    (two.home.version("main", 9) / MANIFEST).write_bytes(b"{}")
    two.publish(b"last")
    assert client.get(f"{MAIN}/manifests/v9").status_code == 500
    assert client.get(f"{MAIN}/blobs/{NONE}").status_code == 404  # a damaged one stands in nobody's way


@pytest.mark.skipif(find_spec("oras") is None, reason="not installed: oras")
def test_oras_pulls_a_version_byte_for_byte(line: "Line", client: httpx.Client, tmp_path: Path) -> None:
    files = {"1_Pooling/config.json": b"{}", "config.json": b"{ }", "model.safetensors": b"weights" * 100_000}
    restate(line, files)
    name = f"{client.base_url.host}:{client.base_url.port}/mainstem/main"
    pinned = digest(client, "v0")
    line.publish(b"later")
    for reference in (f"{name}:v0", f"{name}@{pinned}"):
        folder = tmp_path / "pulled"
        subprocess.run([sys.executable, "-c", PULL, reference, folder], check=True, capture_output=True, timeout=60)
        found: dict[str, Any] = {
            str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
        }
        assert found == files
        shutil.rmtree(folder)
