"""A home with two heads and four merged experts, made once and copied."""

import json
import shutil
from pathlib import Path

import pytest

from daemon.layout import Home
from tests.daemon.homes import Heads, drain, make_home, put
from tests.daemon.processes import environment
from tests.models import write_base, write_expert

HEADS: Heads = (("main", "opcm", {}), ("soup", "mean", {}))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base in a folder, and four experts of it: a file, and folders."""
    root = tmp_path_factory.mktemp("model")
    base = write_base(root / "base", seed=1)
    given = [write_expert(root / name, base, seed) for seed, name in enumerate(["a.safetensors", "b", "c", "d"], 2)]
    (given[2] / "expert.json").write_text(json.dumps({"weight": 2.5, "task": "poems"}))
    return base, given


@pytest.fixture(scope="session")
def merged_root(tmp_path_factory: pytest.TempPathFactory, model: tuple[Path, list[Path]]) -> Path:
    base, given = model
    home = make_home(tmp_path_factory.mktemp("merged") / "home", base, HEADS)
    for path in given:
        copy = tmp_path_factory.mktemp("drop") / path.name
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        put(home, copy)
        drain(home)
    return home.root


@pytest.fixture
def merged(merged_root: Path, tmp_path: Path) -> Home:
    """A home with the heads main (opcm) and soup (mean), at version 4."""
    return Home(shutil.copytree(merged_root, tmp_path / "home", symlinks=True))


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
