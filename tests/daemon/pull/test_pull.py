"""`mainstem pull` into every kind of destination, and what it does not believe."""

import ctypes
import errno
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from daemon.disk import durable
from daemon.errors import DaemonError
from daemon.layout import MANIFEST, Home
from daemon.manifest import FileEntry
from daemon.pull.foreign_manifest import ForeignManifest
from daemon.pull.pulling import pull, wanted
from daemon.pull.target import Target
from tests.daemon.processes import forked
from tests.daemon.pulls import make_line, same_bytes, served, version_in
from tests.models import CONFIG, WEIGHTS


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return make_line(tmp_path_factory.mktemp("line"), versions=3)


def test_pull_makes_a_copy_of_a_version(origin: str, home: Home, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pulled = pull(origin + "/", tmp_path / "new" / "model", report=lambda *progress: seen.append(progress))
    assert same_bytes(tmp_path / "new" / "model", home, 3)
    assert os.listdir(tmp_path / "new") == ["model"]
    files = json.loads(home.manifest("main", 3).read_bytes())["files"]
    size = sum(file["size"] for file in files)
    assert (pulled.version, pulled.files, pulled.size_bytes) == (3, len(files), size)
    assert seen == sorted(seen) and seen[-1] == (size, size)
    pull(origin, tmp_path / "init", head="init", version="1")
    assert (tmp_path / "init" / MANIFEST).read_bytes() == home.manifest("init", 1).read_bytes()


def test_files_in_folders_below_come_too(home: Home, tmp_path: Path) -> None:
    manifest = json.loads(home.manifest("main", 3).read_bytes())
    data = b"{}"
    below = {"name": "1_Pooling/config.json", "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["files"].append(below)
    texts = {3: json.dumps(manifest).encode(), 4: json.dumps(manifest | {"version": 4}).encode()}

    def also(request: Request) -> Response | None:
        path = request.url.path.replace("/versions/4", "/versions/3")
        request.scope["path"] = path
        if path.endswith(below["name"]):
            return Response(data, headers={"ETag": f'"sha256:{below["sha256"]}"'})
        if path.endswith("/versions/3"):
            text = texts[4 if path != request.url.path else 3]
            return Response(text, headers={"ETag": f'"sha256:{hashlib.sha256(text).hexdigest()}"'})
        return None

    with served(home, also) as origin:
        for version in ("3", "4"):
            pull(origin, tmp_path / "model", version=version)
            assert version_in(tmp_path / "model") == int(version)
        assert pull(origin, tmp_path / "model", version="4").up_to_date
    (tmp_path / "model" / "1_Pooling" / "mine").write_bytes(b"")
    with served(home, also) as origin, pytest.raises(DaemonError, match="1_Pooling/mine"):
        pull(origin, tmp_path / "model", version="3")


def test_a_later_pull_replaces_what_an_earlier_one_made(origin: str, home: Home, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    first = pull(origin, dest, version="1")
    assert same_bytes(dest, home, 1) and first.fetched_bytes == first.size_bytes
    with (dest / WEIGHTS).open("rb") as held:
        second = pull(origin, dest)
        assert held.read() == (home.version("main", 1) / WEIGHTS).read_bytes()
    assert same_bytes(dest, home, 3) and second.version == 3
    unchanged = (dest / CONFIG).stat().st_size
    assert second.fetched_bytes <= second.size_bytes - unchanged
    assert os.listdir(tmp_path) == ["model"]


def test_an_older_version_is_put_back_when_it_is_asked_for(origin: str, home: Home, tmp_path: Path) -> None:
    pull(origin, tmp_path / "model")
    assert pull(origin, tmp_path / "model", version="000002").version == 2
    assert same_bytes(tmp_path / "model", home, 2)


def test_what_is_in_place_already_is_not_fetched(origin: str, home: Home, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    pull(origin, dest)
    inode = dest.stat().st_ino
    again = pull(origin, dest)
    assert (again.up_to_date, again.fetched_bytes, dest.stat().st_ino) == (True, 0, inode)
    (dest / WEIGHTS).unlink()
    mended = pull(origin, dest)
    assert not mended.up_to_date and same_bytes(dest, home, 3)
    assert mended.fetched_bytes == (dest / WEIGHTS).stat().st_size
    assert os.listdir(tmp_path) == ["model"]


def test_what_was_damaged_in_place_is_fetched_again(origin: str, home: Home, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    pull(origin, dest)
    with (dest / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    mended = pull(origin, dest)
    assert not mended.up_to_date and same_bytes(dest, home, 3)
    assert mended.fetched_bytes == (dest / WEIGHTS).stat().st_size


def test_a_file_that_was_changed_in_place_is_not_taken_over(origin: str, home: Home, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    pull(origin, dest, version="1")
    with (dest / CONFIG).open("r+b") as file:
        file.write(b"?")
    pull(origin, dest, version="2")
    assert same_bytes(dest, home, 2)


def test_new_folders_above_are_durable_too(
    origin: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[Path] = []
    sync_folder = durable.sync_folder

    def noting(path: Path) -> None:
        synced.append(path)
        sync_folder(path)

    monkeypatch.setattr(durable, "sync_folder", noting)
    pull(origin, tmp_path / "a" / "b" / "model")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(synced)


def test_a_view_comes_with_the_weights_of_the_modules_beside_it() -> None:
    """Of a dense layer of sentence-transformers: no expert brings it, and the folder does not load without."""
    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json", "2_Dense/model.safetensors", CONFIG]
    names += ["adapter/adapter_config.json", "README.md"]
    manifest = ForeignManifest(b"", "", "main", 1, {name: FileEntry(name, 1, "0" * 64) for name in names})
    assert [file.name for file in wanted(manifest, view="1")] == ["2_Dense/model.safetensors", CONFIG]


def test_a_link_stays_and_what_it_names_is_filled(origin: str, home: Home, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("model")
    for version in (1, 2):
        pull(origin, tmp_path / "link", version=str(version))
        assert (tmp_path / "link").readlink() == Path("model")
        assert same_bytes(tmp_path / "model", home, version)


@pytest.mark.parametrize(
    ("there", "message"),
    [
        ({"mine": b"mine"}, "is there already"),
        ({MANIFEST: b'{"name": "a web app"}'}, "is not a version's"),
        ({MANIFEST: b"\xff\x00"}, "is not a version's"),
    ],
)
def test_no_folder_is_replaced_that_no_pull_made(
    there: dict[str, bytes], message: str, origin: str, tmp_path: Path
) -> None:
    (tmp_path / "model").mkdir()
    for name, data in there.items():
        (tmp_path / "model" / name).write_bytes(data)
    with pytest.raises(DaemonError, match=message) as refused:
        pull(origin, tmp_path / "model")
    assert refused.value.hint
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == there
    assert os.listdir(tmp_path) == ["model"]


def test_no_file_of_somebody_else_is_removed(origin: str, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    pull(origin, dest, version="1")
    (dest / "notes.txt").write_text("mine")
    with pytest.raises(DaemonError, match=r"no pull put there: notes\.txt"):
        pull(origin, dest, version="2")
    assert (dest / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DaemonError, match="is there already"):
        pull(origin, tmp_path / "file")


def test_one_pull_at_a_time_fills_a_folder(origin: str, tmp_path: Path) -> None:
    with Target(tmp_path / "model"), pytest.raises(DaemonError, match="another pull"):
        pull(origin, tmp_path / "model")
    pull(origin, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


class OldLibrary:
    """A C library without the call."""

    def __init__(self, *_: object, **__: object) -> None: ...


class Overlay(OldLibrary):
    """As overlayfs answers for a folder that came with the container's image."""

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(errno.EXDEV)
        return -1


@pytest.mark.parametrize("library", [OldLibrary, Overlay])
def test_where_folders_cannot_be_exchanged_nothing_is_lost(
    library: type, origin: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the C library: no file system at hand lacks the call."""
    dest = tmp_path / "model"
    pull(origin, dest, version="1")
    with monkeypatch.context() as patched:
        patched.setattr("daemon.disk.durable.ctypes.CDLL", library)
        with pytest.raises(DaemonError, match="cannot exchange"):
            pull(origin, dest, version="2")
    assert same_bytes(dest, home, 1)
    dest.rename(tmp_path / "old")
    assert pull(origin, dest, version="2").fetched_bytes < (dest / WEIGHTS).stat().st_size
    assert same_bytes(dest, home, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "its sha256 is not the manifest's"),
        ({"size": 5}, "the manifest says 5"),
        ({"size": 5_000_000}, "the manifest says 5000000"),
        ({"size": -1}, "is no manifest"),
        ({"size": True}, "is no manifest"),
        ({"sha256": "0" * 63}, "is no manifest"),
        ({"name": "../escaped"}, "is no manifest"),
        ({"name": "/tmp/escaped"}, "is no manifest"),
        ({"name": ".hidden"}, "is no manifest"),
        ({"name": "nul\0"}, "is no manifest"),
        ({"name": MANIFEST}, "is no manifest"),
        ({"name": "below/../../escaped"}, "is no manifest"),
        ({"name": f"{WEIGHTS}/below"}, "is no manifest"),
        ({"name": 7}, "is no manifest"),
        ({"name": "x" * 256}, "is no manifest"),
        ({"name": "x/" * 600 + "x"}, "is no manifest"),
        ({"size": 1 << 63}, "is no manifest"),
    ],
)
def test_pull_believes_no_manifest(change: dict[str, Any], message: str, home: Home, tmp_path: Path) -> None:
    """What came does not fit the manifest, or its names lead elsewhere: a server that serves another's answers."""
    manifest = json.loads(home.manifest("main", 3).read_bytes())
    next(file for file in manifest["files"] if file["name"] == CONFIG).update(change)
    text = json.dumps(manifest).encode()
    tag = f'"sha256:{hashlib.sha256(text).hexdigest()}"'

    def lie(request: Request) -> Response | None:
        return Response(text, headers={"ETag": tag}) if request.url.path.endswith("/versions/3") else None

    with served(home, lie) as origin, pytest.raises(DaemonError, match=message) as refused:
        pull(origin, tmp_path / "model")
    assert refused.value.hint
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "tag", "message"),
    [
        ({}, '"sha256:' + "0" * 64 + '"', "came with the sha256"),
        ({}, None, "its ETag is none"),
        ({"head": "other"}, "right", "the manifest of other/3"),
        ({"version": 2}, "right", "the manifest of main/2"),
        ({"files": [{"name": "a", "size": 0, "sha256": "0" * 64}] * 2}, "right", "lists a file twice"),
    ],
)
def test_the_manifest_is_held_against_what_the_server_says(
    change: dict[str, Any], tag: str | None, message: str, home: Home, tmp_path: Path
) -> None:
    text = json.dumps(json.loads(home.manifest("main", 3).read_bytes()) | change).encode()
    if tag == "right":
        tag = f'"sha256:{hashlib.sha256(text).hexdigest()}"'

    def lie(request: Request) -> Response | None:
        headers = {"ETag": tag} if tag else {}
        return Response(text, headers=headers) if request.url.path.endswith("/versions/3") else None

    with served(home, lie) as origin, pytest.raises(DaemonError, match=message):
        pull(origin, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("path", ["/latest", "/versions/3", f"/files/{WEIGHTS}"])
def test_no_other_server_is_asked(path: str, home: Home, tmp_path: Path) -> None:
    asked = threading.Event()

    def other(request: Request) -> Response | None:
        asked.set()
        return None

    with served(home, other) as elsewhere:

        def lead_away(request: Request) -> Response | None:
            return RedirectResponse(elsewhere + request.url.path) if request.url.path.endswith(path) else None

        with served(home, lead_away) as origin, pytest.raises(DaemonError, match="sends us elsewhere") as refused:
            pull(origin, tmp_path / "model")
    assert refused.value.hint == "if you trust that address, pull from it"
    assert not asked.is_set()
    assert os.listdir(tmp_path) == []


def test_a_path_in_front_of_the_server_is_kept(home: Home, tmp_path: Path) -> None:
    def behind(request: Request) -> Response | None:
        request.scope["path"] = request.scope["path"].removeprefix("/models")
        return None

    with served(home, behind) as origin:
        pull(f"{origin}/models/", tmp_path / "model")
    assert same_bytes(tmp_path / "model", home, 3)


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:1", "http://", "http://[", "file:///etc/passwd", "http://a:b@h/", "http://h/?q", "http://h:x", ""],
)
def test_an_address_is_an_address(url: str, tmp_path: Path) -> None:
    with pytest.raises(DaemonError, match="is no address of a mainstem"):
        pull(url, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_the_command_line_says_what_it_did(origin: str, tmp_path: Path) -> None:
    dest = tmp_path / "model"
    done = forked("pull", origin, dest, "--version", "2", "--json")
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout)
    assert (first["version"], first["up_to_date"], first["dest"]) == (2, False, str(dest))
    assert first["fetched_bytes"] == first["size_bytes"] > 0
    assert "main/3: 3 files" in forked("pull", origin, dest, "--connections", "1").stdout
    assert "is in" in forked("pull", origin, dest).stdout
    assert version_in(dest) == 3
    wrong = forked("pull", origin, dest, "--watch", "--version", "2")
    assert wrong.returncode == 2 and "leave --version and --view out" in wrong.stderr


def test_a_version_is_named_as_it_is_printed(origin: str, tmp_path: Path) -> None:
    for n, words in enumerate((["init/1"], ["init@v1"], ["v1", "--head", "init"], ["000001", "--head", "init"])):
        done = forked("pull", origin, tmp_path / f"{n}", "--version", *words)
        assert done.returncode == 0 and done.stdout.startswith("init/1: "), done.stderr
    for words in (["init/1", "--head", "main"], ["x/y/z"], ["1.0"]):
        wrong = forked("pull", origin, tmp_path / "no", "--version", *words)
        assert wrong.returncode == 2 and "--version" in wrong.stderr
