"""One process to fork from, and one world, for all crash tests; in memory, where there is room.

What a process leaves that is killed is the same on any filesystem. A missing fsync shows on none after a kill;
test_crash_states.py looks for those.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.home import Home
from tests.crash.daemons import Zygote
from tests.crash.worlds import MakeFolder, World, drain, outcome

MEMORY = Path("/dev/shm")
ROOM_BYTES = 1 << 30  # the tests take a tenth of it


@pytest.fixture(scope="session")
def make_folder() -> Iterator[MakeFolder]:
    """Makes a new folder that lasts as long as the tests."""
    roomy = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES
    with tempfile.TemporaryDirectory(dir=MEMORY if roomy else None) as root:
        yield lambda name: Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))


@pytest.fixture
def tmp_path(make_folder: MakeFolder) -> Iterator[Path]:
    """In place of pytest's own, with the same name."""
    folder = make_folder("test")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def zygote(make_folder: MakeFolder) -> Iterator[Zygote]:
    with Zygote(make_folder("zygote")) as running:
        yield running


@pytest.fixture(scope="session")
def world(make_folder: MakeFolder, zygote: Zygote) -> World:
    return World(make_folder("world"), zygote)


@pytest.fixture(scope="session")
def undisturbed(make_folder: MakeFolder, world: World) -> tuple[Home, list[str]]:
    """A home over which everything was merged in one go, and the failpoints that were passed, in order."""
    root = make_folder("undisturbed")
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
def founding(make_folder: MakeFolder, world: World) -> list[str]:
    """The failpoints passed by `mainstem init`, in order."""
    root: Path = make_folder("founding")
    ended = world.zygote.run(*world.init(root / "home"), trace=root / "trace")
    assert ended.code == 0, ended.log
    return (root / "trace").read_text().split()
