"""One byte flips in a file at rest: the daemon refuses to start and says what to do, or `verify` names the file."""

import shutil
from pathlib import Path

import pytest

from daemon.layout import Home
from tests.crash.worlds import World, drain

REFUSES = {  # the live version: without a clean stop the start hashes it
    "weights": "published/main/000003/model.safetensors",
    "companion": "published/init/000003/config.json",
    "manifest": "published/main/000003/manifest.json",
    "state": "state/heads/init/000003/state.safetensors",
}
NAMED = {
    "weights of an old version": "published/main/000002/model.safetensors",
    "base": "state/base/model.safetensors",
    "archived file": "archive/000001/a.safetensors",
    "archived folder": "archive/000002/b/model.safetensors",
}


@pytest.fixture
def home(undisturbed: tuple[Home, list[str]], expected: dict[str, object], tmp_path: Path) -> Home:
    """A home in which all is merged, stopped cleanly."""
    return Home(shutil.copytree(undisturbed[0].root, tmp_path / "home", symlinks=True))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("path", (REFUSES | NAMED).values(), ids=(REFUSES | NAMED).keys())
def test_verify_names_the_file(path: str, world: World, home: Home) -> None:
    assert world.zygote.run("verify", "--home", home.root).code == 0
    size = (home.root / path).stat().st_size
    for place in (3, size // 2, size - 1):
        flip(home.root / path, place)
        verified = world.zygote.run("verify", "--home", home.root)
        named = str(Path(path).parent if path.startswith(("state/base", "archive")) else path)
        named = "/".join(named.split("/")[:2]) if path.startswith("archive") else named
        assert verified.code == 1 and named in verified.log, verified.log
        flip(home.root / path, place)


@pytest.mark.parametrize("path", REFUSES.values(), ids=REFUSES.keys())
def test_the_start_refuses_a_damaged_live_version(path: str, world: World, home: Home) -> None:
    home.clean.unlink(missing_ok=True)
    flip(home.root / path, (home.root / path).stat().st_size // 2)
    ended = world.zygote.run(*drain(home))
    assert ended.code == 1
    assert path in ended.log and '"hint"' in ended.log and "Traceback" not in ended.log


def test_a_damaged_page_of_the_registry(world: World, home: Home) -> None:
    page = int.from_bytes(home.registry.read_bytes()[16:18], "big")
    pages = home.registry.stat().st_size // page
    for number in range(pages):
        flip(home.registry, number * page + (100 if number == 0 else 0))  # what kind of page it is
        started = world.zygote.run(*drain(home))
        assert started.code == 1, f"page {number + 1}"
        assert '"hint"' in started.log and "Traceback" not in started.log, started.log
        flip(home.registry, number * page + (100 if number == 0 else 0))
    assert world.zygote.run(*drain(home)).code == 0
