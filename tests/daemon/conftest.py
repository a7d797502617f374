"""A base and a home over it, made once and copied: founding one takes longer than most tests here."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.convert import converting, unpickling
from daemon.convert.confining import Options, Told
from daemon.home import Home
from tests.daemon.homes import make_home
from tests.daemon.pulls import served
from tests.models import write_base


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as one file."""
    return write_base(tmp_path_factory.mktemp("base") / "base.safetensors", seed=1)


@pytest.fixture(scope="session")
def fresh_home(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_home(tmp_path_factory.mktemp("fresh") / "home", base).root


@pytest.fixture
def home(fresh_home: Path, tmp_path: Path) -> Home:
    """A new home with the one head `main`, OPCM."""
    return Home(shutil.copytree(fresh_home, tmp_path / "home", symlinks=True))


@pytest.fixture(scope="module")
def origin(home: Home) -> Iterator[str]:
    """Where the module's own `home` is served over HTTP."""
    with served(home) as origin:
        yield origin


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`convert` does here what it has a process for, whose import of torch takes longer than most tests."""

    def unpickle(source: int, target: int, options: Options, tell: Callable[[int, int], None]) -> Told:
        job = unpickling.Job(0, os.dup(source), target, 1 << 30, 1 << 24, 60, options.key, options.strip_prefix)
        return Told(**json.loads(json.dumps(unpickling.convert(job, tell))))

    monkeypatch.setattr(converting, "unpickle", unpickle)
