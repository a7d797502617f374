"""Versions switch, are collected and vanish while clients download: every body is still one version's bytes."""

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from daemon.http.files import Published
from daemon.manifest import FileEntry
from registry.records import Head, Version

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

FILE = "/v1/heads/main/versions/1/files/model.safetensors"
DATA = bytes(range(256)) * 300


@pytest.fixture
def one(line: "Line") -> "Line":
    line.publish(DATA)
    return line


def test_a_collected_version_is_gone_and_names_the_live_one(one: "Line", client: httpx.Client) -> None:
    one.publish(b"second")
    one.store.collected("main", 1)
    for path in ("", "/files/model.safetensors"):
        answer = client.get("/v1/heads/main/versions/1" + path)
        assert (answer.status_code, answer.json()["reason"]) == (410, "collected")
        assert "live version is main/2" in answer.json()["hint"]


def test_files_that_retention_is_removing_are_gone(one: "Line", client: httpx.Client) -> None:
    one.publish(b"second")
    for file in one.home.version("main", 1).iterdir():
        file.unlink()  # the row does not say so yet
    assert client.get(FILE).status_code == 410


def test_a_download_outlives_the_removal_of_its_version(line: "Line", origin: str) -> None:
    big = os.urandom(1 << 20) * 32
    line.publish(big)
    line.publish(b"second")
    host, port = origin.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"GET {FILE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        received = connection.recv(1000)
        (line.home.version("main", 1) / "model.safetensors").unlink()
        line.store.collected("main", 1)
        received += b"".join(iter(lambda: connection.recv(1 << 20), b""))
    assert received.partition(b"\r\n\r\n")[2] == big


def test_a_file_removed_between_open_and_answer_is_still_sent(
    one: "Line", client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = Published.open

    def opens_then_loses(self: Published, head: Head, version: Version, entry: FileEntry) -> int:
        descriptor = opens(self, head, version, entry)
        (one.home.version("main", 1) / entry.name).unlink()
        return descriptor

    monkeypatch.setattr(Published, "open", opens_then_loses)
    assert client.get(FILE).content == DATA


def descriptors_of(path: Path) -> int:
    """How many descriptors of this process are open on that file."""
    wanted = path.stat()
    count = 0
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself is closed by now
            count += os.path.samestat(os.fstat(int(name)), wanted)
    return count


def test_no_descriptor_is_left_open(one: "Line", client: httpx.Client) -> None:
    for _ in range(3):
        client.get(FILE)
        client.head(FILE)
        client.get(FILE, headers={"Range": "bytes=1-2"})
        client.get(FILE, headers={"Range": "bytes=999999-"})
        client.get(FILE, headers={"If-None-Match": "*"})
    for name in ("model.safetensors", "manifest.json"):
        eventually(lambda name=name: descriptors_of(one.home.version("main", 1) / name) == 0)  # type: ignore[misc]


def test_a_client_that_goes_away_frees_its_file(line: "Line", origin: str) -> None:
    line.publish(os.urandom(1 << 20) * 32)
    weights = line.home.version("main", 1) / "model.safetensors"
    host, port = origin.removeprefix("http://").split(":")
    for _ in range(3):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(f"GET {FILE} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            connection.recv(1000)
            assert descriptors_of(weights) > 0
    eventually(lambda: descriptors_of(weights) == 0)


def eventually(holds: Callable[[], bool]) -> None:
    """Answers end a moment after their last byte is read."""
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_downloads_while_versions_switch_and_old_ones_are_collected(line: "Line", client: httpx.Client) -> None:
    rounds = 25
    done = threading.Event()
    checked: list[int] = []
    faults: list[str] = []

    def download(head: str) -> None:
        while not done.is_set():
            manifest = client.get(f"/v1/heads/{head}/latest", follow_redirects=True)
            for entry in manifest.json()["files"] if manifest.status_code == 200 else ():
                answer = client.get(str(manifest.url) + "/files/" + entry["name"])
                if answer.status_code == 410:
                    continue
                if answer.status_code != 200 or hashlib.sha256(answer.content).hexdigest() != entry["sha256"]:
                    faults.append(f"{answer.url} {answer.status_code}")
            if manifest.status_code == 200:
                checked.append(manifest.json()["version"])
            elif manifest.status_code != 410:
                faults.append(f"{manifest.url} {manifest.status_code}")

    threads = [threading.Thread(target=download, args=(head,)) for head in ("main", "init", "main")]
    for thread in threads:
        thread.start()
    try:
        for n in range(1, rounds + 1):
            line.publish(os.urandom(200_000))
            for head in ("main", "init") if n >= 2 else ():
                line.store.collected(head, n - 2)
                for file in line.home.version(head, n - 2).iterdir():
                    file.unlink()
                line.home.version(head, n - 2).rmdir()
            time.sleep(0.02)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert len(set(checked)) > 5, "the versions did not switch under the clients"
