"""One notation for versions, and one way to name a home, in every command."""

import json
import re
import shutil
from pathlib import Path

import pytest

from daemon.errors import DaemonError
from daemon.layout import Home
from daemon.notation import find_version, read_name
from tests.daemon.homes import drain, lineage, make_home, put
from tests.daemon.processes import forked
from tests.models import write_base, write_expert


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with the heads main and soup, at version 1."""
    root = tmp_path_factory.mktemp("versions")
    base = write_base(root / "base.safetensors", seed=1)
    home = make_home(root / "home", base, [("main", "opcm", {}), ("soup", "mean", {})])
    put(home, write_expert(root / "e.safetensors", base, 2))
    drain(home)
    return home


@pytest.mark.parametrize(
    ("words", "number"),
    [
        *(
            (words, 1)
            for words in ("1", "v1", "main", "main/1", "main/v1", "main@1", "main:1", "000001", "main/000001")
        ),
        *((words, 1) for words in ("latest", "main/latest", "soup", "soup@v1")),
        *((words, 0) for words in ("0", "v0", "soup/0")),
    ],
)
def test_whatever_people_write_is_understood(merged: Home, words: str, number: int) -> None:
    with lineage(merged) as reader:
        version = find_version(reader, words)
    assert (version.head, version.number) == ("soup" if words.startswith("soup") else "main", number)


@pytest.mark.parametrize("words", ["main/", "/1", "nobody/1", "main/1/1", "-1", "1.0", "²", "9" * 19, "main/v", ""])
def test_what_names_no_version_is_told(merged: Home, words: str) -> None:
    with lineage(merged) as reader, pytest.raises(DaemonError, match="names no version") as refused:
        find_version(reader, words)
    assert "HEAD/N as main/1" in refused.value.hint


def test_a_head_that_looks_like_a_number_is_a_head() -> None:
    assert read_name("v2", heads=["main", "v2"]) == ("v2", None)


def test_a_version_is_shown_by_its_name(merged: Home) -> None:
    for words in ("soup/1", "soup@1", "soup/v1"):
        shown = json.loads(forked("show", words, "--json", "--home", merged.root).stdout)
        assert (shown["called"], shown["manifest"]["head"]) == ("soup/1", "soup")
    assert json.loads(forked("show", "1", "--json", "--home", merged.root).stdout)["name"] == "e.safetensors"


def test_several_experts_of_one_name_are_set_apart(merged: Home, tmp_path: Path) -> None:
    home = Home(shutil.copytree(merged.root, tmp_path / "home", symlinks=True))
    write_expert(home.inbox / "e.safetensors", home.base / "model.safetensors", 7)
    drain(home)
    blocks = forked("show", "e.safetensors", home.root).stdout.split("\n\n")
    assert [re.findall(r"^id +(\d)", block, re.MULTILINE) for block in blocks] == [["2"], ["1"]]


COMMANDS = {
    "status": (),
    "log": (),
    "show": ("e.safetensors",),
    "compare": ("main/0", "main/1"),
    "inspect": ("new.safetensors",),
    "verify": (),
    "config show": (),
    "config check": (),
    "rebuild": ("--without", "1", "--dry-run"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_home_is_an_argument_an_option_or_in_the_environment(
    merged: Home, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_expert(tmp_path / "new.safetensors", merged.base / "model.safetensors", 5)
    words = [*command.split(), *COMMANDS[command]]
    answers = [forked(*words, merged.root, cwd=tmp_path), forked(*words, "--home", merged.root, cwd=tmp_path)]
    monkeypatch.setenv("MAINSTEM_HOME", str(merged.root))
    answers.append(forked(*words, cwd=tmp_path))
    monkeypatch.setenv("MAINSTEM_HOME", "/nowhere")  # what is typed wins
    answers.append(forked(*words, merged.root, cwd=tmp_path))
    assert [done.returncode for done in answers] == [0] * 4, answers[0].stderr
    assert len({done.stdout for done in answers}) == 1
    twice = forked(*words, merged.root, "--home", tmp_path, cwd=tmp_path)
    assert twice.returncode == 2 and "another home" in twice.stderr


def test_init_takes_the_home_either_way_and_a_name_for_the_base(tmp_path: Path) -> None:
    write_base(tmp_path / "base.safetensors", seed=1)
    for words, name in ((["one"], "org/model"), (["--home", "two"], "org/model"), (["three"], None)):
        named = ["--name", name] if name else []
        done = forked("init", *words, "--base", "base.safetensors", *named, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        home = Home(tmp_path / words[-1])
        with lineage(home) as reader:
            assert reader.base().name == (name or "base.safetensors")
        card = (home.version("main", 0) / "README.md").read_text()
        assert ('base_model: "org/model"' in card) == (name is not None)
    assert forked("init", "--base", "base.safetensors", cwd=tmp_path).returncode == 2
    for name in ("", " ", "a\nb", "x" * 201):
        done = forked("init", "four", "--base", "base.safetensors", "--name", name, cwd=tmp_path)
        assert done.returncode == 1 and "hint:" in done.stderr and not Home(tmp_path / "four").exists()
