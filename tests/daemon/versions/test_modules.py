"""Modules in folders of their own: the base's are published, and an expert that trained one is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.convert.converting import convert
from daemon.errors import BadHome
from daemon.layout import Home
from daemon.reports.inspect import inspect
from tests.daemon.following import command_in
from tests.daemon.homes import drain, experts, lineage, live, make_home
from tests.models import write_base, write_expert

DENSE = "2_Dense/model.safetensors"


def with_dense(folder: Path, dense: dict[str, torch.Tensor]) -> Path:
    (folder / DENSE).parent.mkdir()
    save_file(dense, folder / DENSE)
    (folder / "2_Dense" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def dense() -> dict[str, torch.Tensor]:
    return {"linear.weight": torch.randn(4, 16), "linear.bias": torch.zeros(4)}


@pytest.fixture
def home(tmp_path: Path, dense: dict[str, torch.Tensor]) -> Home:
    return make_home(tmp_path / "home", with_dense(write_base(tmp_path / "base", 1), dense), [("main", "mean", {})])


def moved(path: Path) -> None:
    save_file({name: tensor + 0.1 for name, tensor in load_file(path).items()}, path)


def pickled(path: Path) -> None:
    path.rename(path.with_name("pytorch_model.bin"))


def grown(path: Path) -> None:
    save_file({**load_file(path), "more": torch.zeros(1)}, path)


@pytest.mark.parametrize("how", [moved, pickled, grown])
def test_an_expert_that_trained_one_is_refused_and_merged_without_it(
    how: Callable[[Path], None], home: Home, dense: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    expert = with_dense(write_expert(tmp_path / "e", tmp_path / "base", 2), dense)
    how(expert / DENSE)
    shutil.copytree(expert, home.inbox / "e")
    drain(home)
    (refused,) = experts(home)
    assert (refused.reason, live(home)) == ("module", 0) and "2_Dense" in str(refused.detail)
    with lineage(home) as reader, pytest.raises(Exception, match="would be lost"):
        inspect(home, reader, expert, None)
    assert "drop it again without the folder 2_Dense" in str(refused.hint)
    shutil.rmtree(expert / "2_Dense")
    shutil.copytree(expert, home.inbox / "again")
    drain(home)
    assert live(home) == 1
    assert (home.latest("main") / DENSE).read_bytes() == (tmp_path / "base" / DENSE).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_that_left_it_as_it_was_is_merged(
    dtype: torch.dtype, home: Home, dense: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    saved = {name: tensor.to(dtype) for name, tensor in dense.items()}
    expert = with_dense(write_expert(tmp_path / "e", tmp_path / "base", 2), saved)
    shutil.move(expert, home.inbox / "e")
    drain(home)
    assert live(home) == 1


def test_a_base_with_a_pickled_module_is_refused_until_it_is_converted(
    dense: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    base = with_dense(write_base(tmp_path / "base", 1), dense)
    (base / DENSE).unlink()
    torch.save(dense, base / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(BadHome, match="2_Dense has pickled weights") as refused:
        make_home(tmp_path / "home", base)
    command, what, source, out = command_in(refused.value.hint)
    assert (command, what) == ("mainstem", "convert")
    convert(Path(source), Path(out))
    home = make_home(tmp_path / "home", base)
    assert load_file(home.version("main", 0) / DENSE).keys() == dense.keys()
