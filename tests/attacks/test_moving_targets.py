"""Drops that change while the daemon reads them: never merged half, never lost, and nobody else waits for them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from daemon.checkpoints.checkpoint import OpenCheckpoint
from daemon.compute.progress import Progress
from daemon.errors import Reason, Refused
from daemon.layout import Home
from daemon.service import Service
from projector.files.source import Checkpoint
from registry.records import Status
from tests.daemon.homes import assert_close, count, drain, experts, latest, live, make_home, put, quick
from tests.models import read_weights, write_base, write_expert
from tests.oracles.rules import opcm


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base.safetensors", seed=1)


@pytest.fixture
def home(tmp_path: Path, base: Path) -> Home:
    return make_home(tmp_path / "home", base)


def _during_the_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Calls `act` once, when the first tensor of the first expert has been folded."""
    advance, done = Progress.advance, threading.Event()

    def interrupted(self: Progress, nbytes: int) -> None:
        if self._total and not done.is_set():  # what is read at the start is no expert's
            done.set()
            act()
        advance(self, nbytes)

    monkeypatch.setattr(Progress, "advance", interrupted)


def _is_base_plus(home: Home, base: Path, expert: Path) -> None:
    """Version 1 is the only one, and holds `expert` alone."""
    assert live(home) == 1
    assert_close(latest(home), opcm(read_weights(base), [read_weights(expert)]))


def test_overwritten_in_place_the_new_bytes_are_merged(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = put(home, write_expert(tmp_path / "old.safetensors", base, 2))
    new = write_expert(tmp_path / "new.safetensors", base, 3)

    def overwrite() -> None:
        with target.open("r+b") as file:
            file.write(new.read_bytes())

    _during_the_read(monkeypatch, overwrite)
    metrics = drain(home)
    assert count(metrics, "mainstem_experts_total", outcome="requeued") == 1
    _is_base_plus(home, base, new)


def test_overwritten_with_the_old_times_restored(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `rsync --inplace --times` of a file with the same size and time leaves it: only the ctime tells."""
    target = put(home, write_expert(tmp_path / "old.safetensors", base, 2))
    new = write_expert(tmp_path / "new.safetensors", base, 3)
    before = target.stat()

    def overwrite() -> None:
        with target.open("r+b") as file:
            file.write(new.read_bytes())
        os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))

    _during_the_read(monkeypatch, overwrite)
    drain(home)
    _is_base_plus(home, base, new)


def test_replaced_by_rename_the_newcomer_is_merged(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = put(home, write_expert(tmp_path / "old.safetensors", base, 2))
    new = write_expert(tmp_path / "new.safetensors", base, 3)
    weights = new.read_bytes()
    _during_the_read(monkeypatch, lambda: new.rename(target))
    drain(home)
    new.write_bytes(weights)
    _is_base_plus(home, base, new)


def test_replaced_while_another_is_read_it_is_looked_at_anew(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lay there when its turn was given had come to rest, and what lies there now may not have."""
    first = write_expert(tmp_path / "first.safetensors", base, 2)
    new = write_expert(tmp_path / "new.safetensors", base, 4)
    merged = opcm(read_weights(base), [read_weights(first), read_weights(new)])
    put(home, first)
    target = put(home, write_expert(tmp_path / "second.safetensors", base, 3))
    _during_the_read(monkeypatch, lambda: new.rename(target))
    metrics = drain(home)
    assert count(metrics, "mainstem_experts_total", outcome="requeued") == 1
    assert [(one.name, one.status) for one in experts(home)] == [
        ("first.safetensors", Status.MERGED),
        ("second.safetensors", Status.MERGED),
    ]
    assert_close(latest(home), merged)
    assert os.listdir(home.inbox) == []


def test_truncated_it_is_not_refused_while_it_moves(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uploaders that start over truncate first: the expert must get its second chance."""
    target = put(home, write_expert(tmp_path / "old.safetensors", base, 2))
    whole = target.read_bytes()

    def truncate() -> None:
        os.truncate(target, 100)
        threading.Timer(0.3, lambda: target.write_bytes(whole)).start()

    _during_the_read(monkeypatch, truncate)
    drain(home, quick(inbox={"patience_seconds": 30}))
    kept = tmp_path / "kept.safetensors"
    kept.write_bytes(whole)
    _is_base_plus(home, base, kept)
    assert [expert.status for expert in experts(home)] == [Status.MERGED]


def test_truncated_while_its_names_are_checked(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To know a tied weight under another name, values are read before the first tensor is folded."""
    weights = read_weights(write_expert(tmp_path / "old.safetensors", base, 2))
    name = next(name for name, tensor in weights.items() if tensor.ndim == 2)
    save_file({**weights, "another.name": weights[name].clone()}, tmp_path / "tied.safetensors")
    target = put(home, tmp_path / "tied.safetensors")
    whole, check = target.read_bytes(), OpenCheckpoint.check

    def interrupted(self: OpenCheckpoint, base: Checkpoint, base_config: Mapping[str, Any]) -> None:
        monkeypatch.setattr(OpenCheckpoint, "check", check)
        os.truncate(target, 3000)
        threading.Timer(0.3, lambda: target.write_bytes(whole)).start()
        check(self, base, base_config)

    monkeypatch.setattr(OpenCheckpoint, "check", interrupted)
    drain(home, quick(inbox={"patience_seconds": 30}))
    assert [expert.status for expert in experts(home)] == [Status.MERGED]


def test_what_is_found_while_it_is_written_over_is_not_held_against_it(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an adapter's embedding, of which the values say whether it was trained."""
    target = put(home, write_expert(tmp_path / "old.safetensors", base, 2))
    whole, check = target.read_bytes(), OpenCheckpoint.check

    def interrupted(self: OpenCheckpoint, base: Checkpoint, base_config: Mapping[str, Any]) -> None:
        monkeypatch.setattr(OpenCheckpoint, "check", check)
        target.write_bytes(whole)
        raise Refused(Reason.ADAPTER, "half of the old and half of the new", "drop it again")

    monkeypatch.setattr(OpenCheckpoint, "check", interrupted)
    drain(home, quick(inbox={"patience_seconds": 30}))
    assert [expert.status for expert in experts(home)] == [Status.MERGED]


def test_truncated_and_left_so_it_is_refused(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = put(home, write_expert(tmp_path / "old.safetensors", base, 2))
    _during_the_read(monkeypatch, lambda: os.truncate(target, 3000))
    metrics = drain(home)
    assert count(metrics, "mainstem_refused_total", reason="truncated") == 1
    assert live(home) == 0 and os.listdir(home.tmp) == []


def test_renamed_it_is_merged_once_under_its_new_name(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = put(home, write_expert(tmp_path / "old.safetensors", base, 2))
    _during_the_read(monkeypatch, lambda: target.rename(home.inbox / "new.safetensors"))
    drain(home)
    assert [(expert.name, expert.status) for expert in experts(home)] == [("new.safetensors", Status.MERGED)]
    assert os.listdir(home.archive(1)) == ["new.safetensors"]


def test_withdrawn_it_leaves_no_trace(home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = put(home, write_expert(tmp_path / "old.safetensors", base, 2))
    _during_the_read(monkeypatch, target.unlink)
    drain(home)
    assert live(home) == 0 and experts(home) == []


def test_a_shard_that_changes_counts_too(
    home: Home, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = put(home, write_expert(tmp_path / "old", base, 2))
    new = write_expert(tmp_path / "new", base, 3)
    weights = new / "model.safetensors"
    _during_the_read(monkeypatch, lambda: (folder / "model.safetensors").write_bytes(weights.read_bytes()))
    drain(home)
    _is_base_plus(home, base, new)


def test_a_file_that_never_settles_holds_nobody_up(home: Home, base: Path, tmp_path: Path) -> None:
    good = write_expert(tmp_path / "good.safetensors", base, 2)
    growing = home.inbox / "growing.safetensors"
    growing.touch()
    stop_by = time.monotonic() + 30

    def grow() -> None:
        put(home, good)
        while live(home) == 0 and time.monotonic() < stop_by:
            with growing.open("ab") as file:
                file.write(b"x")
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=grow)
    thread.start()
    settings = quick(inbox={"settle_seconds": 0.5, "watch": "auto"})
    service = Service(home, settings)
    service.run(http=False)
    thread.join()
    assert live(home) == 1
    assert os.listdir(home.inbox) == ["growing.safetensors"]
    assert [expert.name for expert in experts(home)] == ["good.safetensors"]
