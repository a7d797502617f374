"""One process to fork from, and one world, for all crash tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.home import Home
from tests.crash.daemons import Zygote
from tests.crash.worlds import World, drain, outcome


@pytest.fixture(scope="session")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with Zygote(tmp_path_factory.mktemp("zygote")) as running:
        yield running


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> World:
    return World(tmp_path_factory.mktemp("world"), zygote)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, world: World) -> tuple[Home, list[str]]:
    """A home over which everything was merged in one go, and the failpoints that were passed, in order."""
    root = tmp_path_factory.mktemp("undisturbed")
    home, trace = world.home(root / "home"), root / "trace"
    ended = world.zygote.run(*drain(home), trace=trace)
    assert ended.code == 0, ended.log
    return home, trace.read_text().split()


@pytest.fixture(scope="session")
def expected(undisturbed: tuple[Home, list[str]], world: World) -> dict[str, object]:
    """What an undisturbed run gives."""
    home, _ = undisturbed
    world.finish(home, {})
    return outcome(home)


@pytest.fixture(scope="session")
def founding(tmp_path_factory: pytest.TempPathFactory, world: World) -> list[str]:
    """The failpoints passed by `mainstem init`, in order."""
    root: Path = tmp_path_factory.mktemp("founding")
    ended = world.zygote.run(*world.init(root / "home"), trace=root / "trace")
    assert ended.code == 0, ended.log
    return (root / "trace").read_text().split()
