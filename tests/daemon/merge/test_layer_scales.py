"""Heads that scale task vectors by layer, from the drop to a rebuild."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from daemon.layout import Home
from daemon.study.planning import variants
from tests.daemon.homes import assert_close, drain, latest, lineage, make_home, put
from tests.daemon.processes import forked_each, rebuild
from tests.models import read_weights, write_expert
from tests.oracles import rules as oracles

Weights = Mapping[str, Tensor]
LAYERED = {"layer_alpha": 0.5, "layer_beta": 0.75}
SET = ("--set", "layer_alpha=0.5", "--set", "layer_beta=0.75")


def less(base: Weights, expert: Weights) -> dict[str, Tensor]:
    """The expert that moved half as far, and in the last layer of two 1.25 times."""
    return {
        name: x.double() + (1.25 if name.startswith("layers.1.") else 0.5) * (expert[name].double() - x.double())
        if x.is_floating_point()
        else x
        for name, x in base.items()
    }


@pytest.fixture(scope="module")
def merged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, list[dict[str, Tensor]]]:
    """A home after three experts, and these as they count where they are scaled."""
    folder = tmp_path_factory.mktemp("layered")
    heads = [("main", "mean", LAYERED), ("across", "opcm", LAYERED), ("plain", "mean", {})]
    home = make_home(folder / "home", base, heads)
    counted = []
    for seed in (1, 2, 3):
        write_expert(folder / f"{seed}", base, seed)
        counted.append(less(read_weights(base), read_weights(folder / f"{seed}")))
        put(home, folder / f"{seed}")
    drain(home)
    return home, counted


def same_bits(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_every_arrival_counts_by_its_layers(merged: tuple[Home, list[dict[str, Tensor]]], base: Path) -> None:
    home, counted = merged
    theta = read_weights(base)
    assert_close(latest(home), oracles.mean(theta, counted))
    assert_close(latest(home, "across"), oracles.opcm(theta, counted))
    assert json.loads(home.manifest("main", 3).read_bytes())["params"] == LAYERED
    assert "| layer_beta | `0.75` |" in (home.latest("main") / "README.md").read_text()
    with lineage(home) as reader:
        assert {head.name: "layer_alpha" in head.params for head in reader.heads()} == {
            "main": True,
            "across": True,
            "plain": False,  # as every head of an earlier mainstem
        }


def test_it_is_shown_and_compared(merged: tuple[Home, list[dict[str, Tensor]]], base: Path, tmp_path: Path) -> None:
    home, _ = merged
    expert = write_expert(tmp_path / "four", base, 4)
    at = ("--home", home.root)
    told, lines, config, compared = forked_each(
        [
            ("inspect", expert, "--json", *at),
            ("inspect", expert, *at),
            ("config", "show", *at),
            ("compare", "main/3", "plain/3", "--json", *at),
        ]
    )
    found = json.loads(told.stdout)
    assert found["layers"] == [{"name": "layers", "first": 0, "last": 1, "tensors": 8}]
    assert found["layer_scales"] == {"main": [0.5, 1.25], "across": [0.5, 1.25]}
    printed = [" ".join(line.split()) for line in lines.stdout.splitlines()]
    assert "layers layers.0 to 1: 8 tensors" in printed
    assert "layer_scales main: 0.5 in the first layer and outside, 1.25 in the last" in printed
    assert "layer_alpha=0.5 layer_beta=0.75" in config.stdout
    assert compared.returncode == 0, compared.stderr


def test_a_rebuild_and_a_withdrawal_keep_to_it(
    merged: tuple[Home, list[dict[str, Tensor]]], base: Path, tmp_path: Path
) -> None:
    home, counted = Home(shutil.copytree(merged[0].root, tmp_path / "home", symlinks=True)), merged[1]
    theta = read_weights(base)
    rebuild(home, "--into", tmp_path / "again")
    assert all(same_bits(latest(Home(tmp_path / "again"), head), latest(home, head)) for head in ("main", "across"))
    rebuild(home, "--head", "more", "--method", "mean", *SET)
    assert same_bits(latest(home, "more"), latest(home))
    rebuild(home, "--without", "2")  # main by subtraction, the other by merging again
    assert_close(latest(home), oracles.mean(theta, [counted[0], counted[2]]))
    assert_close(latest(home, "across"), oracles.opcm(theta, [counted[0], counted[2]]))


def test_a_study_tries_a_grid_of_it() -> None:
    found = variants(["mean", "opcm"], ["mean.layer_alpha=0.5,1,1.0", "mean.layer_beta=0.5"])
    assert [one.method.params() for one in found[:-1]] == [
        {"layer_alpha": 0.5, "layer_beta": 0.5},
        {"layer_alpha": 1.0, "layer_beta": 0.5},
    ]
    assert "layer_alpha" not in found[-1].method.params()
