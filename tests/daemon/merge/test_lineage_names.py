"""The names by which an expert was merged stay with it: no later setting changes what a rebuild makes of it."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from daemon.layout import Home
from daemon.reports.compare import compare, find_published
from tests.daemon.homes import Heads, assert_close, drain, experts, latest, lineage, make_home, quick
from tests.daemon.processes import environment, forked, rebuild
from tests.models import read_weights, write_expert
from tests.oracles.rules import mean

HEADS: Heads = (("main", "opcm", {}), ("soup", "mean", {}))
FIRST = {"prefixes": {"a.": ""}, "ignore": ["b.*"]}
LATER = {"prefixes": {"b.": ""}, "ignore": ["a.*"]}  # fits as well, and makes another expert of it


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[dict[str, Tensor]]:
    """What "a." is of the expert of two models, what "b." is, and another expert."""
    root = tmp_path_factory.mktemp("models")
    return [read_weights(write_expert(root / f"{seed}.safetensors", base, seed)) for seed in (2, 3, 4)]


@pytest.fixture(scope="module")
def merged_root(tmp_path_factory: pytest.TempPathFactory, base: Path, models: list[dict[str, Tensor]]) -> Path:
    """A home over which an expert that holds two models was merged by the first of them, then another expert.

    After that its settings name the other model.
    """
    home = make_home(tmp_path_factory.mktemp("merged") / "home", base, HEADS)
    both = {f"{prefix}.{name}": one[name] for prefix, one in zip("ab", models[:2], strict=True) for name in one}
    save_file(both, home.inbox / "two.safetensors")
    drain(home, quick(admission=FIRST))
    save_file(models[2], home.inbox / "plain.safetensors")
    drain(home)
    home.config.write_text('[admission]\nprefixes = {"b." = ""}\nignore = ["a.*"]\n')
    return home.root


@pytest.fixture
def merged(merged_root: Path, tmp_path: Path) -> Home:
    return Home(shutil.copytree(merged_root, tmp_path / "home", symlinks=True))


def forget(home: Home) -> None:
    """Makes its rows those of a mainstem that did not note the names."""
    with closing(sqlite3.connect(home.registry)) as raw, raw:
        raw.execute("UPDATE experts SET naming = NULL")


def test_a_rebuild_reads_every_expert_by_the_names_it_was_merged_by(merged: Home, tmp_path: Path) -> None:
    target = Home(tmp_path / "new")
    rebuild(merged, "--into", target.root)
    for head in ("main", "soup"):
        ours, theirs = latest(target, head), latest(merged, head)
        assert all(ours[name].equal(theirs[name]) for name in theirs), head
    assert [e.naming for e in experts(target)] == [FIRST, {"prefixes": {}, "ignore": []}]
    rebuild(merged, "--into", target.root)  # it is the same still

    rebuild(merged, "--head", "again", "--method", "mean")
    assert all(tensor.equal(latest(merged, "soup")[name]) for name, tensor in latest(merged, "again").items())


@pytest.mark.parametrize("words", [(), ("--replay",)])
def test_taking_it_out_takes_out_what_was_merged(
    merged: Home, base: Path, models: list[dict[str, Tensor]], words: tuple[str, ...]
) -> None:
    rebuild(merged, "--without", "two.safetensors", *words)
    assert_close(latest(merged, "soup"), mean(read_weights(base), [models[2]]))


def test_what_is_left_after_another_is_taken_out(merged: Home, base: Path, models: list[dict[str, Tensor]]) -> None:
    rebuild(merged, "--without", "plain.safetensors", "--replay")
    for head in ("main", "soup"):
        assert_close(latest(merged, head), models[0] | {"position_ids": read_weights(base)["position_ids"]})


def test_compare_reads_it_by_those_names_too(merged: Home) -> None:
    with lineage(merged) as reader:
        first = find_published(reader, "soup/1")
        (kept,) = compare(merged, reader, first, first, experts=True)["experts"]
    assert kept["a_kept"] == pytest.approx(1, abs=1e-4)


def test_an_expert_whose_names_nobody_noted_is_read_by_the_settings(
    merged: Home, base: Path, models: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    forget(merged)
    target = Home(tmp_path / "new")
    rebuild(merged, "--into", target.root)
    assert_close(latest(target, "soup"), mean(read_weights(base), models[1:]))
    assert [e.naming for e in experts(target)] == [LATER, LATER]


def test_a_replay_does_not_go_on_where_others_names_were_used(merged: Home, tmp_path: Path) -> None:
    noted = Home(shutil.copytree(merged.root, tmp_path / "noted", symlinks=True))
    forget(merged)
    target = Home(tmp_path / "new")
    rebuild(merged, "--into", target.root)
    done = forked("rebuild", "--home", noted.root, "--into", target.root)
    assert done.returncode == 1 and "other experts were merged there" in done.stderr


def test_the_names_are_shown(merged: Home) -> None:
    shown = json.loads(forked("show", "1", "--home", merged.root, "--json").stdout)
    assert shown["naming"] == FIRST
    assert "a." in forked("show", "1", "--home", merged.root).stdout
    assert json.loads(forked("log", "--home", merged.root, "--json").stdout)[-1]["naming"] == FIRST
