"""The units that ship, by systemd's own tools: they can be loaded, and confine the daemon as far as the docs say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy/systemd"
INSTALLED = "/opt/mainstem/bin/mainstem"
MOST_EXPOSED = {"mainstem.service": 1.5, "mainstem@one.service": 1.5, "mainstem-serve.service": 1.2}

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd: `make system` installs it"
)


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units, with the program where these tests have it."""
    folder = tmp_path_factory.mktemp("units")
    program = Path(sys.executable).with_name("mainstem")
    for path in UNITS.glob("*.service"):
        text = path.read_text()
        assert INSTALLED in text
        (folder / path.name.replace("@.", "@one.")).write_text(text.replace(INSTALLED, str(program)))
    return folder


def told(*words: str, cwd: Path) -> str:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
def test_systemd_finds_nothing_to_complain_of(units: Path) -> None:
    names = sorted(path.name for path in units.iterdir())
    assert names == sorted(MOST_EXPOSED)
    assert told("systemd-analyze", "verify", "--man=no", *(f"./{name}" for name in names), cwd=units) == ""


@needs_systemd
@pytest.mark.parametrize("name", MOST_EXPOSED)
def test_what_a_unit_may_do_is_as_little_as_the_docs_say(units: Path, name: str) -> None:
    said = told("systemd-analyze", "security", "--offline=true", "--no-pager", name, cwd=units)
    found = re.search(r"Overall exposure level for .*: ([\d.]+)", said)
    assert found, said
    assert float(found[1]) <= MOST_EXPOSED[name]
    row = rf"^\| `{re.escape(name.replace('one', ''))}` \| .* ([\d.]+) \|$"
    documented = re.search(row, (ROOT / "docs/operating.md").read_text(), re.MULTILINE)
    assert documented and abs(float(found[1]) - float(documented[1])) <= 0.3  # another systemd asks for more


def test_the_template_is_the_unit_with_a_home_and_a_port_of_its_own() -> None:
    """Whoever changes one changes both."""
    one, many = (
        (UNITS / name).read_text().partition("[Unit]")[2] for name in ("mainstem.service", "mainstem@.service")
    )
    wanted = one.replace("mainstem/home", "mainstem/%i").replace("Description=mainstem,", "Description=mainstem %i,")
    # its settings must be there: without them it would take the port of another home
    assert many == wanted.replace("EnvironmentFile=-/etc/mainstem/mainstem.env", "EnvironmentFile=/etc/mainstem/%i.env")


def test_an_evaluator_may_make_code_as_it_runs() -> None:
    """Products in bfloat16 on a CPU do: torch refuses them where memory that was written may not be run. A service
    that only serves needs none.
    """
    denied = {path.name for path in UNITS.iterdir() if "\nMemoryDenyWriteExecute=yes" in path.read_text()}
    assert denied == {"mainstem-serve.service"}


@needs_systemd
def test_the_user_and_the_folders_are_made(tmp_path: Path) -> None:
    """sysusers into an empty tree, tmpfiles read only: owners are those of the machine that runs it."""
    (tmp_path / "etc").mkdir()
    told("systemd-sysusers", f"--root={tmp_path}", str(UNITS / "sysusers.conf"), cwd=tmp_path)
    assert re.search(r"^mainstem:.*:/var/lib/mainstem:/usr/sbin/nologin$", (tmp_path / "etc/passwd").read_text(), re.M)
    assert re.search(r"^mainstem-trainers:x:\d+:mainstem$", (tmp_path / "etc/group").read_text(), re.M)
    told("systemd-tmpfiles", f"--root={tmp_path}", "--create", str(UNITS / "tmpfiles.conf"), cwd=tmp_path)
    assert (tmp_path / "var/lib/mainstem").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "etc/mainstem").stat().st_mode & 0o777 == 0o750
