"""`mainstem rebuild --head`: a head more, of every expert that was merged."""

import json
import os
from pathlib import Path

import pytest

from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.recovery import recover
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.rebuild.commands import add_head
from daemon.rebuild.replay import Console
from projector.methods import make
from registry.records import Deed, NewIntervention
from registry.store import Store
from tests.daemon.homes import assert_close, drain, latest, lineage, live, put, tree
from tests.daemon.processes import forked, rebuild
from tests.daemon.rebuilds import check, killed, refused, weights
from tests.models import read_weights, write_expert
from tests.oracles.rules import ema


def test_a_new_head_has_every_expert_and_takes_the_next_one(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    assert "4 experts" in rebuild(merged, "--head", "init", "--method", "ema", "--set", "weight=0.3")
    base, given = weights(model, 0, 1, 2, 3)
    assert live(merged, "init") == 4
    assert_close(latest(merged, "init"), ema(base, given, 0.3))
    check(merged)
    manifest = json.loads(merged.manifest("init", 4).read_bytes())
    assert (manifest["version"], manifest["experts"], manifest["method"]) == (4, 4, "ema")
    put(merged, write_expert(tmp_path / "e.safetensors", model[0], 9))
    extra = read_weights(merged.inbox / "e.safetensors")
    drain(merged)
    assert {head: live(merged, head) for head in ("main", "soup", "init")} == {"main": 5, "soup": 5, "init": 5}
    assert_close(latest(merged, "init"), ema(base, [*given, extra], 0.3))
    check(merged)


@pytest.mark.parametrize(
    "point", ["commit.after=kill:2", "publish.before=kill:5", "publish.after=kill:5", "commit.before=kill:5"]
)
def test_a_new_head_whose_making_is_killed(
    point: str, merged: Home, model: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--head", "init", "--method", "ema")
    killed(monkeypatch, point, merged, *words)
    with Store.open(merged.registry) as store:
        assert store.head("init") is None
        recover(merged, store, lambda *_, **__: None)
        assert not merged.versions("init").exists() and not merged.states("init").exists()
    with lineage(merged) as reader:
        assert verify(merged, reader, lambda what: None)[1] == []
    assert merged.rebuilding("init").exists()
    rebuild(merged, *words)
    assert_close(latest(merged, "init"), ema(*weights(model, 0, 1, 2, 3)))
    check(merged)


def test_a_new_head_that_is_killed_as_it_begins(merged: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(monkeypatch, "rename=kill:1", merged, "--head", "init", "--method", "ema")
    rebuild(merged, "--head", "init", "--method", "ema")
    check(merged)


def test_a_new_head_that_is_killed_once_it_is_committed(
    merged: Home, model: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, "commit.after=kill:5", merged, "--head", "init", "--method", "ema")
    assert merged.rebuilding("init").exists()
    drain(merged)
    check(merged)
    assert_close(latest(merged, "init"), ema(*weights(model, 0, 1, 2, 3)))


def test_the_same_command_ends_what_was_killed_once_it_was_committed(
    merged: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it says where it is interrupted; of another head nothing goes on."""
    killed(monkeypatch, "commit.after=kill:5", merged, "--head", "other", "--method", "ema")
    assert "there is a head 'other' already" in refused(merged, "--head", "other", "--method", "mean")
    killed(monkeypatch, "commit.after=kill:5", merged, "--head", "third", "--method", "ema")
    words = ("--head", "third", "--method", "ema")
    assert rebuild(merged, *words) == "third/4: 4 experts are merged\n"
    check(merged)
    assert "there is a head 'third' already" in refused(merged, *words)


def test_a_head_that_is_there_a_folder_in_its_place_and_a_running_daemon(merged: Home) -> None:
    assert "there is a head 'soup' already" in refused(merged, "--head", "soup", "--method", "ema")
    (merged.published / "init").mkdir()
    (merged.published / "init" / "notes").touch()
    assert "belongs to no head" in refused(merged, "--head", "init", "--method", "ema")
    assert (merged.published / "init" / "notes").exists()
    assert "there is no method" in refused(merged, "--head", "mine", "--method", "none")
    fd = durable.lock(merged.lock)
    try:
        assert "another mainstem is running" in refused(merged, "--head", "new", "--method", "ema")
        assert "another command of mainstem works on" in refused(merged, "--without", "1")
    finally:
        os.close(fd)


def test_beside_a_head_that_was_rolled_back_a_new_one_waits_to_be_promoted(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """It has the bad expert, too."""
    with Store.open(merged.registry) as store:
        store.turn("main", 2, NewIntervention(Deed.ROLLBACK, "ann"), "rolled back to main/2")
    said = rebuild(merged, "--head", "init", "--method", "ema")
    assert "init/4 is not live (it was made while main/4 was not live); `mainstem promote init/4`" in said
    assert live(merged, "init") == 0
    put(merged, write_expert(tmp_path / "e.safetensors", model[0], 9))
    drain(merged)
    check(merged)
    assert live(merged, "init") == 0 and live(merged, "soup") == 5
    assert forked("promote", "init/5", "--home", merged.root).returncode == 0
    base, given = weights(model, 0, 1, 2, 3)
    assert_close(latest(merged, "init"), ema(base, [*given, read_weights(merged.archived(5) or tmp_path)]))
    check(merged)


def test_a_new_head_that_keeps_records_has_one_of_each_expert(merged: Home) -> None:
    rebuild(merged, "--without", "2")
    rebuild(merged, "--head", "views", "--method", "emr")
    assert sorted(path.stem for path in merged.views("views").iterdir()) == ["000001", "000003", "000004"]
    check(merged)


@pytest.mark.parametrize("left", ["folder", "registry"])
def test_what_is_left_of_another_rebuild_is_begun_anew(merged: Home, model: tuple[Path, list[Path]], left: str) -> None:
    inner = Home(merged.rebuilding("init"))
    inner.state.mkdir(parents=True)
    inner.inner_mark.touch()
    if left == "registry":
        inner.registry.write_bytes(b"SQLite format 3" + bytes(200))
    rebuild(merged, "--head", "init", "--method", "ema")
    assert_close(latest(merged, "init"), ema(*weights(model, 0, 1, 2, 3)))
    check(merged)


def test_recovery_touches_no_folder_that_only_looks_like_a_rebuild(merged: Home) -> None:
    for name in (
        "rebuild-",
        "rebuild-..",
        "rebuild-a.b",
        "rebuild-main",
        "rebuild-notes",
        "without-000001",
        "without-x",
    ):
        (merged.state / name).mkdir()
        (merged.state / name / "mine").write_text("years of work")
    (merged.published / "notes").mkdir()
    before = tree(merged.published)
    drain(merged)
    assert tree(merged.published) == before and len(list(merged.state.glob("*/mine"))) == 7
    with pytest.raises(BadHome, match="rebuild-notes is in the way"):
        add_head(merged, Settings(), "notes", make("mean", {}), Console())
    assert (merged.state / "rebuild-notes" / "mine").exists()
