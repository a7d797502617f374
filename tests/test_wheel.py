"""What `make dist` builds is whole: installed somewhere else, it makes a home and merges."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.models import write_base, write_expert

ROOT = Path(__file__).parent.parent
PACKAGES = ("daemon", "projector", "registry")
SOURCES = (*PACKAGES, "tests", "bench", "docs", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


def run(*words: str | Path, cwd: Path, **variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAINSTEM_", "PYTHONPATH"))}
    done = subprocess.run(
        words, cwd=cwd, env={**environment, **variables}, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make dist` fills, from a copy of the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    return source / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    [wheel] = dist.glob("*.whl")
    return wheel


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    there = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    assert packed == {path.relative_to(ROOT).as_posix() for path in there if "__pycache__" not in path.parts}


def test_the_source_archive_has_no_tests_that_it_cannot_run(dist: Path) -> None:
    [source] = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        parts = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {*PACKAGES, "pyproject.toml", "README.md", "LICENSE"} <= parts
    assert not parts & {"tests", "bench", "docs"}


def test_the_wheel_installed_elsewhere_makes_a_home_and_merges(wheel: Path, tmp_path: Path) -> None:
    """Only the wheel itself: what it depends on is that of these tests."""
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", site, wheel)
    run(*pip, cwd=tmp_path)
    mainstem, elsewhere = site / "bin" / "mainstem", {"PYTHONPATH": str(site)}
    found = run(sys.executable, "-c", "import daemon; print(daemon.__file__)", cwd=tmp_path, **elsewhere)
    assert Path(found.strip()).is_relative_to(site)
    assert "init" in run(mainstem, "--help", cwd=tmp_path, **elsewhere)
    base = write_base(tmp_path / "base", seed=1)
    run(mainstem, "init", "home", "--base", base, cwd=tmp_path, **elsewhere)
    write_expert(tmp_path / "home" / "inbox" / "tune.safetensors", base, seed=2)
    run(mainstem, "run", "--home", "home", "--once", "--no-http", cwd=tmp_path, **elsewhere)
    assert (tmp_path / "home" / "published" / "main" / "LATEST").read_text() == "000001\n"
    assert "tune" in (tmp_path / "home" / "published" / "main" / "000001" / "README.md").read_text()
