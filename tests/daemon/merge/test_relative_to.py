"""Heads whose task vectors are what was trained since the version that an expert names, from the drop to a rebuild."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from daemon.checkpoints.expert_json import ABOUT
from daemon.home.founding import found
from daemon.layout import Home
from projector.methods import make
from registry.records import Expert, RelativeTo, Status
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, put, quick
from tests.daemon.processes import forked_each, rebuild
from tests.models import WEIGHTS, read_weights, write_expert
from tests.oracles import rules as oracles

Weights = Mapping[str, Tensor]


def make_loop(root: Path, base: Path) -> Home:
    """Two means, of what was trained since and of the ways from the base, and the average that trainers start from."""
    home = Home(root)
    heads = [("main", make("mean")), ("plain", make("mean")), ("init", make("ema"))]
    found(home, base, heads, lambda step: None, relative=["main"])
    return home


def train(home: Home, folder: Path, start: str, seed: int, scale: float = 0.01) -> dict[str, Tensor]:
    """Drops what was trained from this version, and merges it; returns its weights."""
    head, _, number = start.partition("/")
    write_expert(folder, home.version(head, int(number)), seed, scale)
    (folder / ABOUT).write_text(json.dumps({"trained_from": start}))
    weights = read_weights(folder)
    put(home, folder)
    drain(home, quick(retention={"versions": 1, "grace_seconds": 0}))
    return weights


def since(base: Weights, expert: Weights, origin: Weights) -> dict[str, Tensor]:
    """The expert that would have the same task vector, had it begun at the base; float64."""
    return {
        name: tensor.double() + expert[name].double() - origin[name].double() if tensor.is_floating_point() else tensor
        for name, tensor in base.items()
    }


def write_adapter(folder: Path, start: str) -> dict[str, Tensor]:
    """A LoRA adapter for one matrix; returns what it adds, by the tensor's name."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(9)
    a, b = 0.1 * torch.randn(2, 16, generator=draw), 0.1 * torch.randn(32, 2, generator=draw)
    module = "base_model.model.layers.0.up"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up"], "base_model_name_or_path": start}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / ABOUT).write_text(json.dumps({"trained_from": start}))
    return {"layers.0.up.weight": b.double() @ a.double()}


@pytest.fixture(scope="module")
def looped(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, list[Weights], list[Weights]]:
    """A home in which three experts, the last an adapter, each started from a later version; their weights, and those
    that would have the same task vectors from the base."""
    folder = tmp_path_factory.mktemp("looped")
    home, theta = make_loop(folder / "home", base), read_weights(base)
    one = train(home, folder / "one", "main/0", 1)
    first = read_weights(home.version("init", 1))
    two = train(home, folder / "two", "init/1", 2)
    added = write_adapter(folder / "three", "init/2")
    put(home, folder / "three")
    drain(home, quick(retention={"versions": 1, "grace_seconds": 0}))
    three = {name: tensor + added[name] if name in added else tensor for name, tensor in theta.items()}
    return home, [one, two, three], [one, since(theta, two, first), three]


def same_bits(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def trained_from(home: Home) -> list[tuple[str | None, int | None]]:
    return [(expert.trained_head, expert.trained_version) for expert in experts(home)]


def test_a_relative_head_takes_what_was_trained_since(
    looped: tuple[Home, list[Weights], list[Weights]], base: Path
) -> None:
    home, whole, apart = looped
    theta = read_weights(base)
    assert [expert.status for expert in experts(home)] == [Status.MERGED] * 3
    assert_close(latest(home, "main"), oracles.mean(theta, apart))
    assert_close(latest(home, "plain"), oracles.mean(theta, whole))
    assert oracles.norm(oracles.task_vector(oracles.mean(theta, apart), oracles.mean(theta, whole))) > 0.01
    assert trained_from(home) == [("main", 0), ("init", 1), ("init", 2)]
    assert home.version("init", 1).exists() and home.version("init", 2).exists(), "an expert was trained from it"
    assert not home.version("main", 1).exists(), "and from this one none"


def test_it_is_said_wherever_a_head_is(looped: tuple[Home, list[Weights], list[Weights]]) -> None:
    home, _, _ = looped
    with lineage(home) as reader:
        said = {head.name: head.relative_to for head in reader.heads()}
    assert said == {"main": RelativeTo.TRAINED_FROM, "plain": RelativeTo.BASE, "init": RelativeTo.BASE}
    for head, wanted in said.items():
        assert json.loads(home.manifest(head, 3).read_bytes())["relative_to"] == wanted
        card = (home.latest(head) / "README.md").read_text()
        assert ("trained since the version that it names" in card) == (head == "main")
    status, config, shown = forked_each(
        [
            ("status", "--json", "--home", home.root),
            ("config", "show", "--json", "--home", home.root),
            ("show", "2", "--json", "--home", home.root),
        ]
    )
    assert {head["name"]: head["relative_to"] for head in json.loads(status.stdout)["heads"]} == said
    assert {head["name"]: head["relative_to"] for head in json.loads(config.stdout)["heads"]} == said
    two = json.loads(shown.stdout)
    assert (two["trained_head"], two["trained_version"]) == ("init", 1)


def test_a_rebuild_gives_the_same_bits(looped: tuple[Home, list[Weights], list[Weights]], tmp_path: Path) -> None:
    """Whatever came after it, the version that an expert was trained from is the one that it was."""
    home = Home(shutil.copytree(looped[0].root, tmp_path / "home", symlinks=True))
    rebuild(home, "--into", tmp_path / "again")
    again = Home(tmp_path / "again")
    assert all(same_bits(latest(again, head), latest(home, head)) for head in ("main", "plain", "init"))
    assert trained_from(again) == trained_from(home), "the same heads have the same versions"
    rebuild(home, "--into", tmp_path / "fewer", "--method", "mean", "--set", "relative_to=trained_from")
    assert same_bits(latest(Home(tmp_path / "fewer")), latest(home))
    assert trained_from(Home(tmp_path / "fewer")) == [("main", 0), (None, None), (None, None)]
    rebuild(home, "--head", "more", "--method", "mean", "--set", "relative_to=trained_from")
    assert same_bits(latest(home, "more"), latest(home, "main"))
    (refused,) = forked_each(
        [("rebuild", "--home", tmp_path / "fewer", "--head", "x=mean", "--set", "relative_to=trained_from")]
    )
    assert refused.returncode == 1 and "init/1, which is no version of this home" in refused.stderr


@pytest.mark.parametrize("how", [[], ["--replay"]], ids=["subtracted", "replayed"])
def test_an_expert_is_taken_out_by_what_it_brought(
    looped: tuple[Home, list[Weights], list[Weights]], base: Path, how: Sequence[str], tmp_path: Path
) -> None:
    home = Home(shutil.copytree(looped[0].root, tmp_path / "home", symlinks=True))
    rebuild(home, "--without", "2", *how)
    theta, (_, whole, apart) = read_weights(base), looped
    assert_close(latest(home, "main"), oracles.mean(theta, [apart[0], apart[2]]))
    assert_close(latest(home, "plain"), oracles.mean(theta, [whole[0], whole[2]]))


def gone(home: Home) -> None:
    shutil.rmtree(home.version("init", 1))


def damaged(home: Home) -> None:
    path = home.version("init", 1) / WEIGHTS
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\x00\x00\x80\x3f" * 2)


@pytest.mark.parametrize("spoil", [gone, damaged])
def test_an_expert_whose_start_cannot_be_read_waits_in_quarantine(
    looped: tuple[Home, list[Weights], list[Weights]], spoil: object, tmp_path: Path
) -> None:
    home = Home(shutil.copytree(looped[0].root, tmp_path / "home", symlinks=True))
    folder = write_expert(tmp_path / "four", home.version("init", 1), 4)
    (folder / ABOUT).write_text(json.dumps({"trained_from": "init/1"}))
    spoil(home)  # type: ignore[operator]
    put(home, folder)
    drain(home)
    four: Expert = experts(home)[-1]
    assert (four.status, four.reason) == (Status.QUARANTINED, "trained_from")
    assert four.detail and "since init/1, which cannot be read" in four.detail
    if spoil is gone:  # a dry run hashes nothing
        (looked,) = forked_each([("inspect", home.quarantine(four.id) / "four", "--json", "--home", home.root)])
        assert json.loads(looked.stdout)["reason"] == "trained_from"
    shutil.rmtree(home.version("init", 1), ignore_errors=True)
    shutil.copytree(looped[0].version("init", 1), home.version("init", 1))  # what the hint says
    shutil.move(home.quarantine(four.id) / "four", home.inbox / "four")
    drain(home)
    assert experts(home)[-1].status is Status.MERGED
