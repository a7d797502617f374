"""What is public, as CONTRIBUTING.md says it: the package that it shows is made, found, and held to the laws."""

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from projector.laws import LAWS
from projector.methods import make, methods

CONTRIBUTING = Path(__file__).parents[3] / "CONTRIBUTING.md"


def section() -> str:
    [found] = re.findall(r"^## What is public\n(.*?)^## ", CONTRIBUTING.read_text(), re.MULTILINE | re.DOTALL)
    return str(found)


METHOD, TESTS = re.findall(r"```python\n(.*?)```", section(), re.DOTALL)
[REGISTERS] = re.findall(r"```toml\n(.*?)```", section(), re.DOTALL)
PUBLIC = re.findall(r"^- `(projector\.\w+)`", section(), re.MULTILINE)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, as pip would leave it."""
    info = tmp_path / "my_package-1.0.dist-info"
    (tmp_path / "my_package").mkdir()
    info.mkdir()
    (tmp_path / "my_package/merging.py").write_text(METHOD)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    points = tomllib.loads(REGISTERS)["project"]["entry-points"]
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in one.items()) for group, one in points.items()
    ]
    (info / "entry_points.txt").write_text("".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    methods.cache_clear()
    yield
    for name in ("my_package.merging", "my_package"):
        sys.modules.pop(name, None)
    methods.cache_clear()


@pytest.mark.usefixtures("installed")
def test_a_package_of_somebody_elses_works_as_it_is_shown() -> None:
    assert make("mine", {"scale": "0.5"}).params() == {"scale": 0.5}
    theirs: dict[str, Any] = {}
    exec(compile(TESTS, "test_merging.py", "exec"), theirs)
    [mark] = theirs["test_mine"].pytestmark
    assert mark.args == ("law", LAWS)
    for law in mark.args[1]:
        theirs["test_mine"](law)


def test_what_is_shown_is_made_of_what_is_public_alone() -> None:
    taken = [node for text in (METHOD, TESTS) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = {node.module: {alias.name for alias in node.names} for node in taken if node.module in PUBLIC}
    assert {*ours} == {"projector.method", "projector.laws"}
    assert {node.module for node in taken} - {*ours} == {"dataclasses", "my_package.merging"}
    for module, names in ours.items():
        assert names <= {*importlib.import_module(str(module)).__all__}


@pytest.mark.parametrize("module", PUBLIC)
def test_a_public_module_lists_what_is_public_in_it(module: str) -> None:
    """The types in what is public are public too, or nobody could write them down."""
    found = importlib.import_module(module)
    assert found.__all__ == sorted(found.__all__) and all(hasattr(found, name) for name in found.__all__)


def test_nothing_else_is_said_to_be_public() -> None:
    assert PUBLIC == ["projector.method", "projector.laws", "projector.statistics"]
