"""What ends `mainstem run` and `mainstem serve`: the last line of a log in JSON, and a hint that fits."""

import errno
import json
import socket
from pathlib import Path

import pytest

from daemon.config import Log, load, log_of
from daemon.errors import BadConfig
from daemon.http import HttpServer
from daemon.layout import Home
from tests.daemon.homes import make_home
from tests.daemon.processes import forked
from tests.models import write_base


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("fatal")
    return make_home(root / "home", write_base(root / "base.safetensors", seed=1))


def ended(*words: str | Path) -> dict[str, str]:
    """The last line that a command wrote on standard error before it ended with status 1."""
    done = forked(*words)
    assert done.returncode == 1, done.stderr
    line: dict[str, str] = json.loads(done.stderr.splitlines()[-1])
    assert line["level"] == "critical" and line["hint"] and line["timestamp"]
    return line


@pytest.mark.parametrize("command", ["run", "serve"])
def test_whatever_is_fatal_is_a_line_of_the_log(command: str, home: Home, tmp_path: Path) -> None:
    assert "is not a mainstem home" in ended(command, tmp_path)["error"]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        line = ended(command, home.root, "--port", str(taken.getsockname()[1]))
    assert "in use" in line["error"] and "another http.port" in line["hint"] and line["reason"] == "config"


def test_also_where_the_settings_are_wrong_and_where_the_program_is(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAINSTEM_LOG__FORMAT", "json")
    monkeypatch.setenv("MAINSTEM_COMPUT__DEVICE", "cpu")
    line = ended("run", home.root)
    assert "MAINSTEM_COMPUT__DEVICE" in line["error"] and line["hint"] == "MAINSTEM_COMPUTE__DEVICE?"
    monkeypatch.delenv("MAINSTEM_COMPUT__DEVICE")
    monkeypatch.setattr("daemon.service.Service.run", lambda *_, **__: {}["nothing"])
    line = ended("run", home.root)
    assert "KeyError" in line["error"] and "Traceback" in line["exception"]


def test_a_console_is_told_as_ever(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_LOG__FORMAT", "console")
    done = forked("run", tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("mainstem: ") and "    hint: " in done.stderr


def test_what_is_said_of_the_log_is_read_from_whatever_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml = tmp_path / "mainstem.toml"
    assert log_of(toml) == Log() == log_of(None)
    toml.write_text('[htpp]\nport = "x"\n[log]\nformat = "console"\n')
    assert log_of(toml).format == "console"
    monkeypatch.setenv("MAINSTEM_LOG__FORMAT", "json")
    assert log_of(toml).format == "json"
    toml.write_text("[[[")
    assert log_of(toml).format == "json"
    monkeypatch.setenv("MAINSTEM_LOG__FORMAT", "xml")
    assert log_of(toml) == Log()


def advice(host: str, port: int = 0) -> tuple[str, str]:
    with pytest.raises(BadConfig) as refused:
        HttpServer(lambda *_: None, host, port).start()  # type: ignore[arg-type, return-value]
    return str(refused.value), refused.value.hint


@pytest.mark.parametrize("host", ["name.invalid", "[::1]", "http://127.0.0.1", "127.0.0.1:80", "a..b", "a" * 70, "\0"])
def test_a_host_that_is_none_is_told_from_a_port_that_is_taken(host: str) -> None:
    what, hint = advice(host)
    assert "cannot listen on" in what and "without scheme, port and brackets" in hint
    assert what.isprintable()


def test_an_address_of_another_machine_and_a_port_for_root(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "an address of this machine" in advice("192.0.2.1")[1]

    def refuse(*_: object, **__: object) -> socket.socket:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("socket.create_server", refuse)  # root may listen on any
    assert "below 1024" in advice("127.0.0.1", 80)[1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("MAINSTEM_COMPUT__DEVICE", "MAINSTEM_COMPUTE__DEVICE?"),
        ("mainstem_retension__versions", "MAINSTEM_RETENTION__VERSIONS?"),
        ("MAINSTEM_XYZZY__PORT", "there are http, inbox"),
    ],
)
def test_a_table_that_does_not_exist_is_named_with_the_nearest(
    name: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(BadConfig, match=name) as refused:
        load(None)
    assert hint in refused.value.hint


def test_no_host_is_not_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_HTTP__HOST", "")
    with pytest.raises(BadConfig, match=r"http\.host"):
        load(None)
