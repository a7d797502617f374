"""Uploads into a real daemon: merged like any drop, gone after a kill, and taken by nobody else."""

import hashlib
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from daemon.layout import Home
from registry.records import Status
from tests.daemon.homes import assert_close, experts, latest
from tests.daemon.processes import Daemon, mainstem, running, until
from tests.models import WEIGHTS, read_weights, write_expert
from tests.oracles.rules import opcm

TOKEN = "a-token-of-enough-characters"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
VARIABLE = {"MAINSTEM_HTTP__WRITE_TOKEN": TOKEN}


def send(daemon: Daemon, method: str, path: str, content: bytes = b"", **headers: str) -> httpx.Response:
    address = f"{daemon.origin}/v1/experts/{path}"
    return httpx.request(method, address, content=content, headers={**BEARER, **headers}, trust_env=False, timeout=20)


def ready(daemon: Daemon) -> Daemon:
    assert until(lambda: daemon.get("/readyz").status_code == 200, 30)
    return daemon


@pytest.fixture
def token_file(home: Home) -> Home:
    (home.root / "token").write_text(f"{TOKEN}\n")
    home.config.write_text('[http]\nwrite_token_file = "token"\n')
    return home


def test_a_file_and_a_folder_are_merged(token_file: Home, base: Path, tmp_path: Path) -> None:
    home = token_file
    one = write_expert(tmp_path / "one.safetensors", base, 2)
    two = write_expert(tmp_path / "two", base, 3)
    with running("run", "--home", home.root, "--port", "0") as process:
        daemon = ready(process)
        answer = send(daemon, "PUT", "one.safetensors", one.read_bytes())
        assert answer.status_code == 201
        daemon.wait_for(1)
        row = daemon.get(answer.json()["merged"]).json()
        assert (row["name"], row["status"], row["version"]) == ("one.safetensors", "merged", 1)
        for path in sorted(two.iterdir()):
            assert send(daemon, "PUT", f"two/files/{path.name}", path.read_bytes()).status_code == 201
        listed = [
            {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in two.iterdir()
        ]
        committed = httpx.post(
            f"{daemon.origin}/v1/experts/two/commit", json={"files": listed}, headers=BEARER, trust_env=False
        )
        assert committed.status_code == 201
        daemon.wait_for(2)
        scraped = daemon.get("/metrics").text
        assert 'mainstem_uploads_total{outcome="stored"} 3.0' in scraped
        sent = sum(path.stat().st_size for path in (one, *two.iterdir()))
        assert float(scraped.partition("\nmainstem_upload_bytes_total ")[2].split()[0]) == sent
        assert daemon.stop() == 0
        assert TOKEN not in "".join(daemon.lines)
    assert [(row.name, row.status) for row in experts(home)] == [
        ("one.safetensors", Status.MERGED),
        ("two", Status.MERGED),
    ]
    archived = home.archive(experts(home)[0].id) / "one.safetensors"
    assert archived.read_bytes() == one.read_bytes()
    assert_close(latest(home), opcm(read_weights(base), [read_weights(one), read_weights(two / WEIGHTS)]))


def sending(daemon: Daemon, path: str) -> socket.socket:
    """A connection on which more was announced than will be sent."""
    host, port = daemon.origin.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    head = f"PUT /v1/experts/{path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
    connection.sendall(head.encode() + b"Content-Length: 90000000\r\n\r\n" + bytes(3 << 20))
    return connection


def left(home: Home) -> list[str]:
    return sorted(str(path.relative_to(home.inbox)) for path in home.inbox.rglob("*"))


def test_after_a_kill_nothing_is_left(home: Home, base: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("not ours")
    with running("run", "--home", home.root, "--port", "0", **VARIABLE) as process:
        daemon = ready(process)
        assert send(daemon, "PUT", "folder/files/a.safetensors", b"whole").status_code == 201
        with sending(daemon, "cut.safetensors"), sending(daemon, "folder/files/b.safetensors"):
            parts = [
                home.uploads / "cut.safetensors/.cut.safetensors.part",
                home.uploads / "folder/.b.safetensors.part",
            ]
            assert until(lambda: all(part.exists() for part in parts), 30)
            process.process.send_signal(signal.SIGKILL)
            process.process.wait(timeout=30)
    assert all(part.exists() for part in parts)
    (home.uploads / "folder" / "link").symlink_to(outside)
    (home.old_uploads / "of an older mainstem").mkdir(parents=True)
    (home.old_uploads / "link").symlink_to(outside)
    expert = write_expert(tmp_path / "one.safetensors", base, 2)
    with running("run", "--home", home.root, "--port", "0", **VARIABLE) as process:
        daemon = ready(process)
        assert left(home) == []
        assert not home.uploads.exists()
        assert send(daemon, "PUT", "cut.safetensors", expert.read_bytes()).status_code == 201
        daemon.wait_for(1)
        assert daemon.stop() == 0
    assert [row.name for row in experts(home)] == ["cut.safetensors"]
    assert (outside / "precious").exists()


@pytest.fixture
def serving(home: Home) -> Iterator[Daemon]:
    with running("serve", "--home", home.root, "--port", "0", **VARIABLE) as serving:
        yield serving


def test_serve_takes_nothing_whatever_the_settings(home: Home, serving: Daemon) -> None:
    for method, path, status in (
        ("PUT", "a.safetensors", 405),
        ("DELETE", "a.safetensors", 405),
        ("PUT", "a/files/b.safetensors", 404),
        ("POST", "a/commit", 404),
    ):
        assert send(serving, method, path, b"x").status_code == status, path
    assert left(home) == []


def test_config_show_hides_the_token(home: Home) -> None:
    for flags in ((), ("--json",)):
        shown = mainstem("config", "show", "--home", home.root, *flags, **VARIABLE)
        assert shown.returncode == 0, shown.stderr
        assert "http.write_token" in shown.stdout
        assert TOKEN not in shown.stdout + shown.stderr


def test_a_token_that_is_easily_guessed_stops_the_start(home: Home) -> None:
    done = mainstem("run", "--home", home.root, "--once", "--no-http", MAINSTEM_HTTP__WRITE_TOKEN="secret")
    assert done.returncode != 0
    assert '"hint"' in done.stderr
    assert "secret" not in done.stderr.replace("write token", "")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_documents_commands_work(token_file: Home, base: Path, tmp_path: Path) -> None:
    """docs/http.md, under "Uploads", as it is written there."""
    text = (Path(__file__).parents[3] / "docs/http.md").read_text()
    commands = [block for block in text.split("```sh\n")[1:] if "-T " in block]
    assert len(commands) == 1
    write_expert(tmp_path / "legal-german.safetensors", base, 2)
    write_expert(tmp_path / "legal-french", base, 3)
    with running("run", "--home", token_file.root, "--port", "0") as process:
        daemon = ready(process)
        script = commands[0].partition("```")[0].replace("http://127.0.0.1:8765", daemon.origin)
        done = mainstem_shell(script.replace("curl ", "curl --noproxy '*' "), tmp_path)
        assert done == 0
        daemon.wait_for(2)


def mainstem_shell(script: str, folder: Path) -> int:
    import subprocess

    return subprocess.run(["bash", "-eux", "-c", script], cwd=folder, env={**os.environ, "TOKEN": TOKEN}).returncode
