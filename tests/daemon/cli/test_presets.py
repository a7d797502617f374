"""`mainstem init --preset`, and the heads that `config show` prints."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from daemon.checkpoints.checkpoint import open_path
from daemon.cli.init import heads_chosen
from daemon.errors import BadConfig
from daemon.home.presets import PRESETS
from daemon.layout import Home
from projector.driver.steps import state_specs
from projector.methods import make
from projector.text import size
from tests.daemon.homes import lineage
from tests.daemon.processes import forked_each


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_row_says(name: str) -> None:
    made = heads_chosen(name, None, [], []).methods
    assert next(iter(made)) == "main"
    assert made == {head: make(method, params) for head, (method, params) in PRESETS[name].heads.items()}
    for head, (_, params) in PRESETS[name].heads.items():
        assert params.items() <= made[head].params().items()


def test_the_protocols_of_time_are_theirs() -> None:
    """Best-in-TIME averages for the start and for the deployment, from the base on, one half each."""
    named = {name: {head: method for head, (method, _) in preset.heads.items()} for name, preset in PRESETS.items()}
    assert named == {
        "best-in-time": {"main": "ema", "init": "ema"},
        "offline": {"main": "mean", "init": "zero_shot"},
        "opcm": {"main": "opcm"},
        "continual": {"main": "latest", "init": "latest"},
    }
    assert make("ema", PRESETS["best-in-time"].heads["init"][1]).params() == {"weight": 0.5, "start": "base"}


def test_what_is_given_goes_before_the_preset() -> None:
    given = ["init.weight=0.2", "soup.scheme=log", "soup.relative_to=trained_from"]
    made = heads_chosen("best-in-time", "mean", ["soup=recency"], given)
    assert made.relative == {"soup"}
    assert made.methods == {
        "main": make("mean"),
        "init": make("ema", {"weight": 0.2}),
        "soup": make("recency", {"scheme": "log"}),
    }
    assert heads_chosen("offline", None, ["init=latest"], []).methods["init"] == make("latest")
    with pytest.raises(BadConfig, match="expected KEY=VALUE"):
        heads_chosen("opcm", None, [], ["init.weight=0.2"])
    with pytest.raises(BadConfig, match="relative_to cannot be 'latest'") as refused:
        heads_chosen("opcm", None, [], ["relative_to=latest"])
    assert refused.value.hint == "allowed: base, trained_from"


@pytest.mark.parametrize(
    ("words", "warned"),
    [
        (["init=iso_c"], True),
        (["init=ties"], False),
        (["init=ties", "init.combine=sum"], True),
        (["init=opcm", "init.layer_beta=1"], False),
        (["init=iso_c", "init.relative_to=trained_from"], False),
        (["soup=iso_c"], False),
    ],
    ids=str,
)
def test_a_head_to_start_from_that_grows_is_warned_about(
    words: list[str], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    heads_chosen("opcm", None, words[:1], words[1:])
    said = capsys.readouterr().err
    assert said.count("the head init adds task vectors up") == warned
    assert not warned or "take an average for it" in said


def test_no_preset_is_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    for name in PRESETS:
        heads_chosen(name, None, [], [])
    assert not capsys.readouterr().err


def test_config_check_warns_of_it_too_and_following_the_hint_helps(tmp_path: Path, base: Path) -> None:
    at = ("--home", tmp_path / "home")
    made, checked = forked_each(
        [("init", tmp_path / "home", "--base", base, "--head", "init=iso_c"), ("config", "check", *at)]
    )
    assert made.returncode == 0 and "the head init adds task vectors up (iso_c)" in made.stderr
    assert checked.returncode == 0 and "the head init adds task vectors up (iso_c)" in checked.stderr
    made, checked = forked_each(
        [
            ("init", tmp_path / "2", "--base", base, "--head", "init=iso_c", "--set", "init.relative_to=trained_from"),
            ("config", "check", "--home", tmp_path / "2"),
        ]
    )
    assert not made.stderr.count("adds task vectors up") and not checked.stderr


def test_who_names_no_method_gets_the_best_one_and_is_told_why_and_what_else_there_is(
    tmp_path: Path, base: Path
) -> None:
    places = [tmp_path / name for name in ("none", "preset", "method")]
    words: list[list[str]] = [[], ["--preset", "opcm"], ["--method", "opcm"]]
    done = forked_each([("init", at, "--base", base, *given) for at, given in zip(places, words, strict=True)])
    said = [made.stdout.count("main merges by confluence, which kept most of real experts") for made in done]
    assert said == [1, 0, 0], done
    with open_path(base) as checkpoint:
        schema = checkpoint.tensors.schema
    for method in ("confluence", "opcm"):
        state = sum(spec.nbytes for spec in state_specs(make(method), schema))
        assert f"state takes {size(state)}" in done[0].stdout
    assert "docs/quality.md" in done[0].stdout and "--preset opcm" in done[0].stdout
    (further,) = forked_each([("init", tmp_path / "further", "--base", base, "--head", "soup=mean")])
    told = {0: [], 1: [("main", "opcm")], 2: [("main", "opcm")], 3: [("soup", "mean")]}
    for place, heads in told.items():
        lines = [*done, further][place].stdout.splitlines()
        state = {method: sum(spec.nbytes for spec in state_specs(make(method), schema)) for _, method in heads}
        wanted = [f"{head} merges by {method}; its state takes {size(state[method])}" for head, method in heads]
        assert [line for line in lines if " merges by " in line and ", which" not in line] == wanted
    assert "--preset" not in done[1].stdout + done[2].stdout
    methods = []
    for at in places:
        with lineage(Home(at)) as reader:
            methods.append([head.method for head in reader.heads()])
    assert methods == [["confluence"], ["opcm"], ["opcm"]]


def test_a_base_too_large_for_the_default_is_made_by_the_preset_that_the_hint_names(tmp_path: Path) -> None:
    wide = tmp_path / "wide.safetensors"
    save_file({"layers.0.down.weight": torch.zeros(8, 800)}, wide)
    budget = {"MAINSTEM_COMPUTE__MEMORY_BUDGET": str(1 << 20)}
    refused, named, made = forked_each(
        [
            ("init", tmp_path / "home", "--base", wide),
            ("init", tmp_path / "home", "--base", wide, "--method", "confluence"),
            ("init", tmp_path / "home", "--base", wide, "--preset", "opcm"),
        ],
        first=lambda: os.environ.update(budget),
    )
    assert refused.returncode == 1 and "with --preset opcm it fits" in refused.stderr
    assert named.returncode == 1 and "--preset" not in named.stderr
    assert made.returncode == 0, made.stderr


def test_a_disk_too_small_for_the_state_of_the_default_is_told_before_anything_is_made(
    tmp_path: Path, base: Path
) -> None:
    with open_path(base) as checkpoint:
        schema = checkpoint.tensors.schema
    states = {name: sum(spec.nbytes for spec in state_specs(make(name), schema)) for name in ("confluence", "opcm")}
    for method, hinted in (("confluence", True), ("opcm", False)):
        usage = SimpleNamespace(free=2 * states[method] - 1)
        (refused,) = forked_each(
            [("init", tmp_path / "home", "--base", base)],
            first=lambda usage=usage: setattr(shutil, "disk_usage", lambda _: usage),
        )
        assert refused.returncode == 1 and f"has {size(usage.free)} free" in refused.stderr
        assert f"confluence keeps {size(states['confluence'])}" in refused.stderr
        assert ("with --preset opcm it fits" in refused.stderr) == hinted
        assert not (tmp_path / "home").exists()


def test_config_show_prints_the_heads(tmp_path: Path, base: Path) -> None:
    home = tmp_path / "home"
    made, text, plain, wrong = forked_each(
        [
            ("init", home, "--base", base, "--preset", "best-in-time", "--set", "init.weight=0.25"),
            ("config", "show", "--home", home),
            ("config", "show", "--home", home, "--json"),
            ("init", tmp_path / "other", "--base", base, "--preset", "worst-in-time"),
        ]
    )
    assert made.returncode == text.returncode == plain.returncode == 0, made.stderr + text.stderr + plain.stderr
    assert "http.port" in text.stdout and "weight=0.25 start=base" in text.stdout
    settings = json.loads(plain.stdout)
    assert settings["http.port"] == 8765
    assert settings["heads"] == [
        {"name": "main", "method": "ema", "params": {"weight": 0.5, "start": "base"}, "relative_to": "base"},
        {"name": "init", "method": "ema", "params": {"weight": 0.25, "start": "base"}, "relative_to": "base"},
    ]
    with lineage(Home(home)) as reader:
        assert [head.name for head in reader.heads()] == ["main", "init"]
    assert wrong.returncode == 2 and "best-in-time" in wrong.stderr
