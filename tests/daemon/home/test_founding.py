"""Making a home: what it holds afterwards, what is refused, and that an interrupted `init` leaves none."""

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.checkpoints import checkpoint
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.cli import init
from daemon.disk import durable
from daemon.errors import BadHome, DaemonError
from daemon.home import founding
from daemon.home.verification import verify
from daemon.layout import Home
from projector.errors import BadValues, ProjectorError
from tests.daemon.homes import drain, latest, lineage, live, make_home, put, tree
from tests.daemon.processes import forked_each
from tests.models import CONFIG, read_weights, write_base, write_expert


def test_a_new_home_publishes_the_base_itself(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "deep" / "home", base, [("main", "opcm", {}), ("soup", "mean", {})])
    for head in ("main", "soup"):
        assert live(home, head) == 0
        assert home.latest(head).readlink() == Path("000000")
        for name, tensor in read_weights(base).items():
            assert torch.equal(latest(home, head)[name], tensor)
        assert (home.latest(head) / CONFIG).read_bytes() == (base / CONFIG).read_bytes()
    with lineage(home) as reader, open_path(base) as opened:
        assert reader.base().sha256 == opened.identity()
        assert reader.base().parameters == sum(t.numel() for t in read_weights(base).values() if t.is_floating_point())
        assert verify(home, reader, lambda what: None)[1] == []


def test_the_base_that_init_is_given_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, opened = write_base(tmp_path / "base", seed=1), []

    def counted(path: Path, *words: Any, **more: Any) -> OpenCheckpoint:
        opened.append(path)
        return open_path(path, *words, **more)

    for module in (founding, checkpoint):
        monkeypatch.setattr(module, "open_path", counted)
    init.command(base, tmp_path / "home")
    assert opened.count(base) == 1 and len(opened) == 2  # and its copy, whose digests count


def test_the_home_depends_on_no_outside_path(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    base = write_base(tmp_path / "there" / "base", seed=1)
    expert = write_expert(tmp_path / "e.safetensors", base, 2)
    make_home(tmp_path / "home", base)
    shutil.rmtree(tmp_path / "there")
    moved = Home((tmp_path / "home").rename(tmp_path / "elsewhere"))
    put(moved, expert)
    drain(moved)
    assert live(moved) == 1


def test_a_base_that_is_a_link_is_copied(tmp_path: Path) -> None:
    write_base(tmp_path / "real.safetensors", seed=1)
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "link.safetensors")
    (copied,) = home.base.iterdir()
    assert not copied.is_symlink() and not copied.samefile(tmp_path / "real.safetensors")


def _nan(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights["layers.1.up.weight"].view(-1)[-1] = float("nan")
    return weights


def test_a_base_with_a_nan_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=1)
    save_file(_nan(load_file(base)), base)
    with pytest.raises(BadValues, match=r"layers\.1\.up\.weight holds NaN") as refused:
        make_home(tmp_path / "home", base)
    assert str(base) in str(refused.value)
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("name", ["missing", "missing/base.safetensors", "link"])
def test_a_base_that_is_not_there_is_refused_without_a_trace(tmp_path: Path, name: str) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(BadHome, match="does not exist") as refused:
        make_home(tmp_path / "home", tmp_path / name)
    assert "--base" in refused.value.hint
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("content", [b"", b"text, no weights", b"\x80\x04pickle"])
def test_a_base_that_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "base.safetensors").write_bytes(content)
    with pytest.raises((DaemonError, ProjectorError), match=r"the base .*base\.safetensors") as refused:
        make_home(tmp_path / "home", tmp_path / "base.safetensors")
    assert isinstance(refused.value, DaemonError | ProjectorError) and refused.value.hint
    assert not Home(tmp_path / "home").exists()


def test_a_base_without_floating_tensors_is_refused(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(3)}, tmp_path / "base.safetensors")
    with pytest.raises(BadHome, match="no floating tensor"):
        make_home(tmp_path / "home", tmp_path / "base.safetensors")


@pytest.mark.parametrize("name", ["thesis.tex", ".git", "model.safetensors"])
def test_a_folder_that_holds_anything_is_left_alone(tmp_path: Path, base: Path, name: str) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / name).write_text("years of work")
    with pytest.raises(BadHome, match="is not empty"):
        make_home(tmp_path / "home", base)
    assert tree(tmp_path / "home") == {name: b"years of work"}


def test_a_file_in_the_way_of_a_home_is_named(tmp_path: Path, base: Path, home: Home) -> None:
    file = tmp_path / "thesis.tex"
    file.write_text("years of work")
    done = forked_each(
        [
            ("init", file, "--base", base),
            ("init", file / "home", "--base", base),
            ("rebuild", "--home", home.root, "--into", file),
            ("rebuild", "--home", home.root, "--into", file / "home", "--dry-run"),
        ]
    )
    for refused in done:
        assert refused.returncode == 1 and f"{file} is no folder" in refused.stderr, refused
        assert "choose a new or empty folder" in refused.stderr
    assert file.read_text() == "years of work"


def test_a_home_is_never_made_twice(home: Home, base: Path) -> None:
    before = tree(home.root)
    with pytest.raises(BadHome, match="is a mainstem home already"):
        make_home(home.root, base)
    assert tree(home.root) == before


def test_settings_laid_down_beforehand_are_kept(tmp_path: Path, base: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mainstem.toml").write_text("[http]\nport = 9\n")
    assert make_home(tmp_path / "home", base).config.read_text() == "[http]\nport = 9\n"


class PowerCut(BaseException):
    """Ends `init` where it stands, whatever it would catch."""


@pytest.mark.parametrize("passes", range(1, 30, 2))
def test_interrupted_anywhere_it_leaves_no_home_and_can_be_repeated(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """Cut at the n-th step that makes something durable. Beyond the last one, init is simply done."""
    left = passes

    def cut(point: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise PowerCut(point)

    with monkeypatch.context() as patched:
        patched.setattr(durable, "hit", cut)
        with suppress(PowerCut):
            make_home(tmp_path / "home", base)
    home = Home(tmp_path / "home")
    if not home.exists():  # else only the registry's own rename, the last step, was left to be synced
        home = make_home(tmp_path / "home", base)
    with lineage(home) as reader:
        assert verify(home, reader, lambda what: None)[1] == []
    drain(home)
    assert live(home) == 0
    assert set(os.listdir(home.state)) >= {"base", "heads", "registry.sqlite", "tmp"}
