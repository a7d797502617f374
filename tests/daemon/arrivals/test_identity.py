"""The same tensors in other files are the same expert; anything else is another."""

import errno
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.arrivals import identity
from daemon.arrivals.attempts import TRIES
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.config import Settings
from daemon.errors import BadHome
from daemon.layout import Home
from daemon.rebuild.commands import into
from daemon.rebuild.replay import Console
from daemon.reports.inspect import inspect
from registry.records import Status
from tests.daemon.arrivals.test_attempts import fail_reading
from tests.daemon.homes import drain, experts, latest, lineage, live, make_home, put, quick
from tests.daemon.processes import forked
from tests.daemon.rebuilds import taken_out
from tests.models import write_expert

Weights = dict[str, Tensor]


def with_metadata(weights: Weights, to: Path) -> Path:
    save_file(weights, to / "again.safetensors", metadata={"format": "pt", "note": "saved again"})
    return to / "again.safetensors"


def in_two_shards(weights: Weights, to: Path) -> Path:
    folder = to / "again"
    folder.mkdir()
    names = [sorted(weights)[::2], sorted(weights)[1::2]]
    places: dict[str, str] = {}
    for number, some in enumerate(names, start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in some}, folder / shard)
        places |= dict.fromkeys(some, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def in_another_order(weights: Weights, to: Path) -> Path:
    """Written by hand: the library sorts by dtype and name."""
    header, data = {}, b""
    for name in sorted(weights, reverse=True):
        raw = weights[name].numpy().tobytes()
        dtype = {torch.float32: "F32", torch.int64: "I64"}[weights[name].dtype]
        shape = list(weights[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (to / "again.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return to / "again.safetensors"


def under_a_prefix(weights: Weights, to: Path) -> Path:
    save_file({f"module.{name}": tensor for name, tensor in weights.items()}, to / "again.safetensors")
    return to / "again.safetensors"


def without_its_buffer(weights: Weights, to: Path) -> Path:
    """What is not floating is the base's in every version."""
    save_file(
        {name: tensor for name, tensor in weights.items() if tensor.is_floating_point()}, to / "again.safetensors"
    )
    return to / "again.safetensors"


SAME = [with_metadata, in_two_shards, in_another_order, under_a_prefix, without_its_buffer]
SETTINGS = quick(admission={"prefixes": {"module.": ""}})


@pytest.fixture
def merged(home: Home, base: Path, tmp_path: Path) -> tuple[Home, Weights]:
    """A home that has merged one expert, and its weights."""
    loaded = load_file(write_expert(tmp_path / "first.safetensors", base, 5))
    weights = {name: tensor.clone() for name, tensor in loaded.items()}  # and no map of a file that is in the home
    put(home, tmp_path / "first.safetensors")
    drain(home)
    return home, weights


@pytest.mark.parametrize("saved", SAME)
def test_the_same_tensors_in_other_files_count_once(
    merged: tuple[Home, Weights], tmp_path: Path, saved: Callable[[Weights, Path], Path]
) -> None:
    home, weights = merged
    drop = saved(weights, tmp_path)
    with lineage(home) as reader:
        home.config.write_text('[admission]\nmax_base_ratio = 1e-9\nprefixes = {"module." = ""}\n')  # asked of others
        dry = inspect(home, reader, drop, None)
        assert dry["duplicate_of"] == 1 and dry["flags"] == []
        assert dry["warning"].endswith("which came with main/1: dropping it merges nothing, and makes no version")
        assert dry["hint"] == "nothing is to be done"
    put(home, drop)
    drain(home, SETTINGS)
    again = experts(home)[-1]
    assert (again.status, again.duplicate_of, live(home)) == (Status.DUPLICATE, 1, 1)
    assert again.sha256 != experts(home)[0].sha256


def one_value_off(weights: Weights) -> Weights:
    weights["layers.1.up.weight"][0, 0] += 1e-3
    return weights


def two_tensors_changed_places(weights: Weights) -> Weights:
    """Of the same norm, as a task vector, to the last digit or nearly so."""
    one, other = "layers.0.norm.weight", "layers.1.norm.weight"
    return weights | {one: weights[other], other: weights[one]}


@pytest.mark.parametrize("other", [one_value_off, two_tensors_changed_places])
def test_other_tensors_are_another_expert(
    merged: tuple[Home, Weights], tmp_path: Path, other: Callable[[Weights], Weights]
) -> None:
    home, weights = merged
    save_file(other(dict(weights)), tmp_path / "other.safetensors")
    put(home, tmp_path / "other.safetensors")
    drain(home)
    assert experts(home)[-1].status is Status.MERGED and live(home) == 2


def test_a_withdrawn_expert_may_come_again_in_other_files(merged: tuple[Home, Weights], tmp_path: Path) -> None:
    home, weights = merged
    taken_out(home, Settings(), "1")
    assert forked("unblock", "1", "--home", home.root).returncode == 0
    put(home, with_metadata(weights, tmp_path))
    drain(home)
    assert [expert.status for expert in experts(home)] == [Status.WITHDRAWN, Status.MERGED]


def forget(home: Home) -> None:
    """As an earlier mainstem left it: it noted no content."""
    with closing(sqlite3.connect(home.registry)) as connection, connection:
        connection.execute("UPDATE experts SET content_sha256 = NULL")


def test_an_expert_of_an_earlier_mainstem_is_looked_up_in_the_archive(
    merged: tuple[Home, Weights], base: Path, tmp_path: Path
) -> None:
    home, weights = merged
    known = experts(home)[0].content_sha256
    assert known
    forget(home)
    put(home, write_expert(tmp_path / "other.safetensors", base, 6))
    drain(home)
    assert experts(home)[0].content_sha256 is None  # of another norm: nothing was read of it
    put(home, with_metadata(weights, tmp_path))
    drain(home)
    assert (experts(home)[-1].status, experts(home)[-1].duplicate_of) == (Status.DUPLICATE, 1)
    assert experts(home)[0].content_sha256 == known


@pytest.mark.parametrize("gone", [True, False], ids=["pruned", "damaged"])
def test_where_the_archive_cannot_tell_it_is_merged(merged: tuple[Home, Weights], tmp_path: Path, gone: bool) -> None:
    home, weights = merged
    forget(home)
    if gone:
        shutil.rmtree(home.archive(1))
    else:
        (home.archive(1) / "first.safetensors").write_bytes(b"no more")
    put(home, with_metadata(weights, tmp_path))
    drain(home)
    assert live(home) == 2


def test_an_archive_that_cannot_be_read_is_no_experts_fault(
    merged: tuple[Home, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is the same is not known: it is neither refused nor merged twice."""
    home, weights = merged
    forget(home)
    put(home, with_metadata(weights, tmp_path))
    with monkeypatch.context() as patch:
        fail_reading(patch, errno.EIO, f"{home.archive(1).name}/first.safetensors")
        for _ in range(TRIES + 1):
            with pytest.raises(BadHome, match=r"archive/000001.*cannot be read \(Input/output error\)") as stopped:
                drain(home)
    assert [one.status for one in experts(home)] == [Status.MERGED] and os.listdir(home.inbox) == ["again.safetensors"]
    assert not home.attempts.exists() and not home.in_hand.exists() and not os.listdir(home.tmp)
    assert "put it back from a backup, or move it out of archive/" in stopped.value.hint
    aside = home.archive(1).rename(tmp_path / "aside")
    drain(home)
    assert live(home) == 2, "the hint's second way"
    assert aside.exists()


def test_no_descriptor_for_the_archive_is_no_damage(
    merged: tuple[Home, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, weights = merged
    forget(home)
    put(home, with_metadata(weights, tmp_path))
    with monkeypatch.context() as patch:
        fail_reading(patch, errno.EMFILE, f"{home.archive(1).name}/first.safetensors")
        with pytest.raises(OSError, match="Too many open files"):
            drain(home)
    drain(home)
    assert (experts(home)[-1].status, experts(home)[-1].duplicate_of) == (Status.DUPLICATE, 1)


def test_what_was_merged_twice_before_is_rebuilt_as_it_was(merged: tuple[Home, Weights], tmp_path: Path) -> None:
    home, weights = merged
    forget(home)
    kept = home.archive(1).rename(tmp_path / "kept")
    put(home, with_metadata(weights, tmp_path))
    drain(home)
    kept.rename(home.archive(1))
    into(home, Home(tmp_path / "new"), Settings(), None, [], Console())
    assert live(Home(tmp_path / "new")) == 2
    for name, tensor in latest(home).items():
        assert torch.equal(latest(Home(tmp_path / "new"))[name], tensor)
    save_file(weights, tmp_path / "third.safetensors", metadata={"third": "time"})
    for one in (home, Home(tmp_path / "new")):
        put(one, Path(shutil.copy(tmp_path / "third.safetensors", tmp_path / "copy.safetensors")))
        drain(one)
        assert experts(one)[-1].status is Status.DUPLICATE and live(one) == 2


def test_sigterm_is_heeded_while_an_archived_expert_is_read(
    merged: tuple[Home, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, weights = merged
    forget(home)
    put(home, with_metadata(weights, tmp_path))
    real = identity.open_path

    def told(*given: Any, **more: Any) -> OpenCheckpoint:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given, **more)

    monkeypatch.setattr(identity, "open_path", told)
    drain(home)
    assert len(experts(home)) == 1 and os.listdir(home.inbox) == ["again.safetensors"]
    monkeypatch.undo()
    drain(home)
    assert experts(home)[1].duplicate_of == 1


def test_what_an_earlier_mainstem_noted_of_a_model_with_derived_buffers_is_known(tmp_path: Path) -> None:
    """It counted rotary frequencies among the weights."""
    base = {"layer.weight": torch.randn(6, 6), "rotary_emb.inv_freq": torch.rand(4)}
    save_file(base, tmp_path / "base.safetensors")
    tuned = {**base, "layer.weight": base["layer.weight"] + 0.01}
    save_file(tuned, tmp_path / "one.safetensors")
    save_file(tuned, tmp_path / "again.safetensors", metadata={"saved": "again"})
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors")
    with open_path(tmp_path / "one.safetensors") as checkpoint, open_path(tmp_path / "base.safetensors") as origin:
        checkpoint.check(origin.tensors)
        before = checkpoint.older_content(origin.tensors)
        assert before and before != checkpoint.content()
    put(home, tmp_path / "one.safetensors")
    drain(home)
    with sqlite3.connect(home.registry) as registry:
        (noted,) = registry.execute("SELECT content_sha256 FROM experts").fetchone()
        assert noted != before
        registry.execute("UPDATE experts SET content_sha256 = ?", (before,))
    put(home, tmp_path / "again.safetensors")
    drain(home)
    assert [one.status for one in experts(home)] == [Status.MERGED, Status.DUPLICATE]
