"""A duplicate's weights are kept once, nothing else of it is removed, and a rebuild finds them all the same."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.arrivals import duplicates, filing
from daemon.compute.progress import Abandoned, Progress
from daemon.config import Settings
from daemon.disk import durable
from daemon.home.recovery import recover
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.rebuild.commands import into
from daemon.rebuild.replay import Console
from registry.records import Status
from registry.store import Store
from tests.daemon.homes import drain, experts, latest, lineage, live, make_home, put, quick, tree
from tests.models import write_base, write_expert


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home that has merged one expert, a folder with more than weights."""
    home = make_home(tmp_path / "home", write_base(tmp_path / "base", 1))
    expert = write_expert(tmp_path / "expert", tmp_path / "base", 2)
    put(home, Path(shutil.copytree(expert, tmp_path / "first")))
    drain(home)
    return home


def sound(home: Home) -> bool:
    with lineage(home) as reader:
        return verify(home, reader, lambda what: None)[1] == []


def again(home: Home, tmp_path: Path, change: Callable[[Path], Path | None] = lambda folder: None) -> Path:
    """Drops the same expert once more, changed, and returns where its archive is."""
    folder = Path(shutil.copytree(tmp_path / "expert", tmp_path / "again"))
    put(home, change(folder) or folder)
    drain(home)
    assert experts(home)[-1].status is Status.DUPLICATE and live(home) == 1
    return home.archive(experts(home)[-1].id)


def sharded(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    halves = [sorted(weights)[::2], sorted(weights)[1::2]]
    names = [f"model-{n}-of-00002.safetensors" for n in ("00001", "00002")]
    for name, half in zip(names, halves, strict=True):
        save_file({tensor: weights[tensor].clone() for tensor in half}, folder / name)
    places = {tensor: name for name, half in zip(names, halves, strict=True) for tensor in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()


def test_what_it_brought_besides_stays(home: Home, tmp_path: Path) -> None:
    def with_a_note(folder: Path) -> None:
        (folder / "expert.json").write_text('{"task": "poems"}')

    before = tree(home.archive(1))
    kept = again(home, tmp_path, with_a_note)
    assert sorted(path.name for path in kept.rglob("*")) == ["again", "config.json", "expert.json"]
    assert tree(home.archive(1)) == before and sound(home)


def test_a_bare_file_goes_whole(home: Home, tmp_path: Path) -> None:
    kept = again(home, tmp_path, lambda folder: (folder / "model.safetensors").rename(tmp_path / "bare.safetensors"))
    assert kept.is_dir() and not list(kept.iterdir()) and sound(home)


def test_the_same_tensors_in_shards_go_too(home: Home, tmp_path: Path) -> None:
    kept = again(home, tmp_path, sharded)
    assert not list(kept.rglob("*.safetensors")) and sound(home)


@pytest.mark.parametrize("below", ["checkpoint-500", "snapshots/a1b2"])
def test_weights_that_lie_further_down_go_too(home: Home, tmp_path: Path, below: str) -> None:
    def nested(folder: Path) -> None:
        (folder / below).mkdir(parents=True)
        (folder / "model.safetensors").rename(folder / below / "model.safetensors")

    kept = again(home, tmp_path, nested)
    assert sorted(path.name for path in kept.rglob("*")) == ["again", "config.json"] and sound(home)


def test_nothing_is_removed_behind_a_link(home: Home, tmp_path: Path) -> None:
    twin = home.archive(1) / "first"
    kept = again(home, tmp_path, lambda folder: (folder / "link").symlink_to(twin))
    assert (twin / "model.safetensors").exists() and sound(home)
    assert not (kept / "again" / "model.safetensors").exists()


def test_tensors_that_the_twin_has_not_keep_their_file(home: Home, tmp_path: Path) -> None:
    """What is ignored makes no other expert, but it may be the only copy of what its head learnt."""

    def with_a_head(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors") | {"head.weight": torch.ones(2, 2)}
        save_file({name: tensor.clone() for name, tensor in weights.items()}, folder / "model.safetensors")

    folder = Path(shutil.copytree(tmp_path / "expert", tmp_path / "again"))
    with_a_head(folder)
    put(home, folder)
    drain(home, quick(admission={"ignore": ["head.*"]}))
    assert experts(home)[-1].status is Status.DUPLICATE
    assert (home.archive(2) / "again" / "model.safetensors").exists()


def test_a_twin_that_is_damaged_keeps_the_duplicates_bytes(home: Home, tmp_path: Path) -> None:
    path = home.archive(1) / "first" / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    assert (again(home, tmp_path) / "again" / "model.safetensors").exists()


def test_where_the_twins_files_are_gone_they_take_their_place(home: Home, tmp_path: Path) -> None:
    shutil.rmtree(home.archive(1))
    kept = again(home, tmp_path)
    assert not list(kept.iterdir()) and (home.archive(1) / "again" / "model.safetensors").exists() and sound(home)
    into(home, Home(tmp_path / "new"), Settings(), None, [], Console())
    for name, tensor in latest(home).items():
        assert torch.equal(tensor, latest(Home(tmp_path / "new"))[name])


def test_one_of_another_weight_does_not_take_that_place(home: Home, tmp_path: Path) -> None:
    def heavier(folder: Path) -> None:
        (folder / "expert.json").write_text('{"weight": 2.0}')

    shutil.rmtree(home.archive(1))
    kept = again(home, tmp_path, heavier)
    assert (kept / "again" / "model.safetensors").exists() and not home.archive(1).exists()


@pytest.mark.parametrize("shards", [1, 2])
def test_what_may_not_be_removed_stays_and_ends_nothing(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: int
) -> None:
    """Immutable, or of another owner in a sticky folder: the others go all the same."""
    real, denied = os.unlink, "model.safetensors" if shards == 1 else "model-00001-of-00002.safetensors"

    def unlink(path: Any, **more: Any) -> None:
        if Path(path).name == denied and home.archive(2) in Path(path).parents:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        real(path, **more)

    monkeypatch.setattr(os, "unlink", unlink)
    kept = again(home, tmp_path, sharded if shards == 2 else lambda folder: None)
    assert [path.name for path in kept.rglob("*.safetensors")] == [denied]
    assert experts(home)[-1].place and not os.listdir(home.inbox) and sound(home)


class PowerCut(BaseException):
    """Ends what is going on where it stands."""


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("passes", range(1, 12, 2))
def test_cut_short_anywhere_it_is_finished_by_recovery(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pruned: bool, passes: int
) -> None:
    folder = Path(shutil.copytree(tmp_path / "expert", tmp_path / "again"))
    sharded(folder)
    for shard in folder.glob("model-*"):  # several files to remove, and no second checkpoint
        shard.rename(folder / shard.name.replace("model-", "model.fp16-"))
    shutil.copy(tmp_path / "expert" / "model.safetensors", folder / "model.safetensors")
    put(home, folder)
    if pruned:
        shutil.rmtree(home.archive(1))
    with monkeypatch.context() as patched:
        patched.setattr(filing, "place", lambda *_: False)
        patched.setattr("daemon.merge.merger.place", lambda *_: False)
        drain(home)
    left = passes

    def cut(point: str) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise PowerCut(point)

    with Store.open(home.registry) as store:
        with monkeypatch.context() as patched:
            patched.setattr(durable, "hit", cut)
            with suppress(PowerCut):
                filing.place_all(home, store)
        recover(home, store, lambda *_, **__: None)
        assert not store.unplaced()
    if pruned:
        assert not list(home.archive(2).iterdir()) and (home.archive(1) / "again" / "model.safetensors").exists()
    else:
        assert not list(home.archive(2).rglob("*.safetensors"))
        assert (home.archive(2) / "again" / "config.json").exists()
    assert sound(home)


def test_sigterm_while_it_is_compared_ends_that_and_the_next_start_goes_on(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(home, Path(shutil.copytree(tmp_path / "expert", tmp_path / "again")))
    real = duplicates.spare

    def told(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(*given)

    monkeypatch.setattr(filing, "spare", told)
    drain(home)
    twin = experts(home)[1]
    assert (twin.status, twin.place) == (Status.DUPLICATE, None)
    assert (home.archive(2) / "again" / "model.safetensors").exists() and home.clean.exists()
    monkeypatch.undo()
    drain(home)
    assert experts(home)[1].place == "archive/000002"
    assert not (home.archive(2) / "again" / "model.safetensors").exists() and sound(home)


def test_a_stop_is_heeded_in_the_duplicates_own_files_too(tmp_path: Path) -> None:
    stopping = Event()
    stopping.set()
    path = write_base(tmp_path / "base.safetensors", 1)
    with pytest.raises(Abandoned):
        duplicates._tensors_in(path, Progress(stopping, lambda _: None))
