"""`mainstem init --preset`, and the heads that `config show` prints."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from daemon.arrivals.receiving import RESERVE_BYTES
from daemon.checkpoints.checkpoint import open_path
from daemon.cli.init import heads_chosen
from daemon.config import Settings
from daemon.errors import BadConfig
from daemon.home.presets import PRESETS
from daemon.layout import Home
from daemon.reports.sizing import sizing
from projector.driver.steps import state_specs
from projector.errors import BadParameter
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
    with pytest.raises(BadParameter, match="confluence has no parameter 'alpha'") as unnamed:
        heads_chosen(None, None, [], ["alpha=0.4"])
    assert unnamed.value.hint.endswith("; main merges by confluence where no --method is named")
    assert heads_chosen(None, "opcm", [], ["alpha=0.4"]).methods == {"main": make("opcm", {"alpha": 0.4})}
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
    said = [made.stdout.count("main merges by confluence, which keeps most on weights alone") for made in done]
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
    home = ("init", tmp_path / "home", "--base", wide)
    small = {"MAINSTEM_COMPUTE__MEMORY_BUDGET": str(1 << 20)}
    *refused, chosen, made = forked_each(
        [
            home,
            (*home, "--head", "x=mean"),
            (*home, "--head", "x=confluence"),
            (*home, "--method", "confluence"),
            (*home, "--set", "knee=0.2"),
            (*home, "--set", "exclude=*down*"),
            ("init", tmp_path / "other", "--base", wide, "--preset", "opcm", "--head", "x=mean"),
        ],
        first=lambda: os.environ.update(small),
    )
    assert {one.returncode for one in refused} == {1} and chosen.returncode == made.returncode == 0, made.stderr
    hinted = ["with --preset opcm it fits" in one.stderr for one in refused]
    assert hinted == [True, True, False, False, False], refused
    assert f"state takes {size(4 * 8 * 800)}" in chosen.stdout, "what is averaged keeps its sum"
    needed = re.search(r"MEMORY_BUDGET=(\d+)", refused[2].stderr)
    assert needed
    both = {"MAINSTEM_COMPUTE__MEMORY_BUDGET": needed[1]}
    shutil.rmtree(tmp_path / "home")
    (enough,) = forked_each([(*home, "--head", "x=confluence")], first=lambda: os.environ.update(both))
    assert enough.returncode == 0, enough.stderr


def test_a_disk_too_small_for_the_default_is_told_with_what_the_leaner_preset_needs(tmp_path: Path, base: Path) -> None:
    def begun(home: Path, free: int, *words: str) -> str:
        usage = SimpleNamespace(free=free)
        (done,) = forked_each(
            [("init", home, "--base", base, *words)], first=lambda: setattr(shutil, "disk_usage", lambda _: usage)
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    said = begun(tmp_path / "small", 64 << 20)
    assert f"small has {size(64 << 20)} free" in said and "begun with --preset opcm it needs" in said
    with open_path(base) as checkpoint:
        for method, where in (("confluence", "comes to need"), ("opcm", "opcm it needs")):
            took = sizing(checkpoint, 0, [make(method)], Settings())
            most = took.home_bytes + took.arrival_bytes + checkpoint.size_bytes
            assert f"{where} {size(most + RESERVE_BYTES)}" in said
    assert "free" not in begun(tmp_path / "large", 1 << 40)
    assert "free" not in begun(tmp_path / "named", 64 << 20, "--method", "confluence")


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
