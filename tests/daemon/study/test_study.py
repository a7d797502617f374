"""A whole study with a real evaluator: what it finds is what the daemon makes, killed at any time or not."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_svg  # noqa: F401 - or each fork imports it anew
import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.layout import Home
from tests.daemon.homes import drain, experts, make_home, quick
from tests.daemon.processes import forked, forked_each
from tests.jsons import documented
from tests.models import write_base, write_expert

NAMES = ("french", "german", "law")
PYTHON = f"{sys.executable} -IS"
EVALUATOR = """
import array, json, os, sys
told = json.load(sys.stdin)

def read(folder):
    raw = open(folder + "/model.safetensors", "rb").read()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    values = array.array("f")
    for name in ("layers.0.up.weight", "layers.1.attention.weight"):
        first, last = header[name]["data_offsets"]
        values.frombytes(raw[start + first : start + last])
    return values

with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps([told["head"], told["version"], told["expert"] and told["expert"]["name"]]) + "\\n")
if os.environ.get("KILL_AT") == str(len(open("calls.jsonl").readlines())):
    os.kill(int(os.environ["STUDY"]), 9)
if os.path.exists("broken"):
    sys.exit("no GPU")
base, model = read("base"), read(sys.argv[1])
scores = {}
for task in ("french", "german", "law"):  # how far the model is on the way to each expert: 0.5 at the base, 0.9 there
    way = [b - a for a, b in zip(base, read("experts/" + task))]
    along = sum((m - a) * w for m, a, w in zip(model, base, way)) / sum(w * w for w in way)
    scores[task] = round(0.5 + 0.4 * along, 6)
length = sum((m - a) ** 2 for m, a in zip(model, base)) ** 0.5
scores["general"] = {"score": round(1 - 0.1 * length, 6), "held_out": True}
print(json.dumps(scores))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, three experts, and what scores a model."""
    folder = tmp_path_factory.mktemp("world")
    base = write_base(folder / "base", seed=1)
    (folder / "experts").mkdir()
    for seed, name in enumerate(NAMES, start=2):
        expert = write_expert(folder / "experts" / name, base, seed, scale=0.01 * seed)
        (expert / "expert.json").write_text(json.dumps({"task": name, "trained_from": "main/12"}))
    (folder / "score.py").write_text(EVALUATOR)
    return folder


def words(**options: object) -> list[str]:
    evaluate = f"{PYTHON} score.py {{folder}}"
    given = {"base": "base", "experts": "experts", "evaluate": evaluate, "methods": "ema,mean", "orders": 2}
    given |= {"set": "ema.weight=0.3,0.5", "out": "out"} | options
    return [
        "study",
        *(word for key, value in given.items() if value for word in (f"--{key.replace('_', '-')}", str(value))),
    ]


def study(world: Path, first: Callable[[], None] = lambda: None, **options: object) -> subprocess.CompletedProcess[str]:
    return forked(*words(**options), cwd=world, first=first)


def said(world: Path, out: str = "out") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world / out / "study.json").read_bytes())
    assert ", ".join(f"`{key}`" for key in found) == documented()["study"]
    return found


def lasting(found: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(found, dict):
        return {k: lasting(v) for k, v in found.items() if k not in ("made_at", "seconds", "peak_bytes")}
    return [lasting(one) for one in found] if isinstance(found, list) else found


def calls(world: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (world / "calls.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(world: Path) -> tuple[dict[str, Any], str, list[list[Any]]]:
    """A study that nobody disturbed: study.json, what it printed, the evaluator's calls."""
    done = study(world)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("/25 ") == 25 and "\n25/25 order 2" in done.stderr
    return said(world), done.stdout, calls(world)


def test_a_study_says_what_it_found(finished: tuple[dict[str, Any], str, list[list[Any]]], world: Path) -> None:
    found, printed, asked = finished
    assert [one["label"] for one in found["methods"]] == ["ema weight=0.3", "ema weight=0.5", "mean"]
    for one in found["methods"]:
        assert (
            one["acc"]["orders"] == 2 and one["acc"] == one["held_in"] and one["held_out"]["mean"] > one["acc"]["mean"]
        )
        assert one["seconds"] > 0 and one["state_bytes"] > 0 and one["published_bytes"] > 0
        finals = [order["versions"][-1]["scores"] for order in one["orders"]]
        means = [sum(scores[task]["score"] for task in NAMES) / 3 for scores in finals]
        assert one["acc"]["mean"] == pytest.approx(sum(means) / 2)
        assert one["acc"]["least"] == pytest.approx(min(means)) and one["acc"]["most"] == pytest.approx(max(means))
        assert all(order["figures"]["bwt_tasks"] == 2 for order in one["orders"])
    own = {name: found["experts"][name][name]["score"] for name in NAMES}
    assert own == {name: pytest.approx(0.9, abs=1e-5) for name in NAMES}, "each by itself is all the way to itself"
    ema, _, mean = found["methods"]
    assert mean["acc"]["mean"] == pytest.approx(0.5 + 0.4 / 3, abs=0.02) and mean["order_independent"]
    assert ema["sensitivity"] and not mean["sensitivity"]
    assert not [call for call in asked if call[0] == "mean" and call[1] == 1], "the expert itself was scored before"
    page = (world / "out" / "report.html").read_text()
    assert "<h2>The study</h2>" in page and "ema weight=0.5" in page and "Overlap of the experts" in page
    assert "could not be read" not in page
    assert found["recommended"]["command"] in printed
    made = forked(*shlex.split(found["recommended"]["command"].replace("HOME", "recommended"))[1:], cwd=world)
    assert made.returncode == 0, made.stderr


def test_it_is_what_the_daemon_makes(
    finished: tuple[dict[str, Any], str, list[list[Any]]], world: Path, tmp_path: Path
) -> None:
    found, order = finished[0], finished[0]["orders"][1]
    home = make_home(tmp_path / "home", world / "base", [("main", "ema", {"weight": 0.5})])
    for name in order:
        shutil.copytree(world / "experts" / name, home.inbox / name)
        (home.inbox / name / "expert.json").write_text("{}")
        drain(home, quick())
    command = [*PYTHON.split(), "score.py", str(home.latest("main").resolve())]
    told = json.dumps({"head": "main", "version": 3, "expert": None}).encode()
    scored = subprocess.run(command, cwd=world, capture_output=True, input=told, check=True)
    last = found["methods"][1]["orders"][1]["versions"][-1]
    assert last["expert"] == order[-1]
    scores = json.loads(scored.stdout)
    assert {task: last["scores"][task]["score"] for task in NAMES} == {task: scores[task] for task in NAMES}


def test_little_is_left_on_disk_and_the_experts_are_links(
    finished: tuple[dict[str, Any], str, list[list[Any]]], world: Path
) -> None:
    first, second = Home(world / "out/orders/01"), Home(world / "out/orders/02")
    for expert in experts(first):
        archived = first.archived(expert.id)
        assert archived and (archived / "model.safetensors").samefile(
            world / "experts" / expert.name / "model.safetensors"
        )
    assert second.registry.exists() and not second.base.exists() and not second.published.exists()
    assert not list((world / "out/orders").rglob("state.safetensors"))


def test_stopped_at_any_time_the_same_command_goes_on_and_finds_the_same(
    finished: tuple[dict[str, Any], str, list[list[Any]]], world: Path
) -> None:
    (world / "calls.jsonl").unlink()
    (world / "broken").touch()
    failing = study(world, out="resumed")
    assert failing.returncode == 1
    assert "the base was not scored: the evaluator failed (exit status 1): no GPU" in failing.stderr
    log = failing.stderr.partition("what it wrote is in ")[2].partition(";")[0]
    assert "no GPU" in Path(log).read_text()
    (world / "broken").unlink()

    def dying(**variables: str) -> Callable[[], None]:
        return lambda: os.environ.update(variables, STUDY=str(os.getpid()))

    killers: Sequence[dict[str, str]] = (
        {"MAINSTEM_FAILPOINT": "commit.after=kill:9"},  # two experts, their costs, then the third by itself
        {"KILL_AT": "10"},  # in the midst of an order
    )
    for killer in killers:
        killed = study(world, dying(**killer), out="resumed")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (world / "resumed/study.json").exists()
    ended = study(world, out="resumed")
    assert ended.returncode == 0, ended.stderr
    assert "going on: " in ended.stderr
    assert lasting(said(world, "resumed")) == lasting(finished[0])
    asked_again = 1 + sum("KILL_AT" in killer for killer in killers)
    assert len(calls(world)) == len(finished[2]) + asked_again, "what was finished is not done again"
    again = forked(*words(out="resumed", seed=7), cwd=world)
    assert again.returncode == 1 and "another study" in again.stderr and "its seed" in again.stderr


def test_a_dry_run_leaves_nothing(world: Path) -> None:
    done = forked(*words(out="dry", methods="mean", set=""), "--dry-run", cwd=world)
    assert done.returncode == 0, done.stderr
    assert "11 cells in all; about " in done.stdout
    assert not [path for path in world.iterdir() if path.name.startswith("dry")]


def test_an_expert_that_is_refused_is_named_with_the_reason(world: Path, tmp_path: Path) -> None:
    for folder in ("odd", "twice"):
        shutil.copytree(world / "experts", tmp_path / folder)
    bad = load_file(tmp_path / "odd/french/model.safetensors")
    bad["layers.0.up.weight"][0, 0] = torch.nan
    save_file(bad, tmp_path / "odd/french/model.safetensors")
    shutil.copytree(world / "experts/french", tmp_path / "twice/again")
    (tmp_path / "empty").mkdir()
    (tmp_path / "score.sh").write_text("echo '{\"a\": 1}'")
    given = {"base": world / "base", "evaluate": "sh score.sh {folder}", "methods": "mean", "set": ""}
    none, odd, twice = forked_each(
        [words(**given, experts=tmp_path / name, out=f"of-{name}") for name in ("empty", "odd", "twice")],
        cwd=tmp_path,
    )
    assert [one.returncode for one in (none, odd, twice)] == [1, 1, 1]
    assert "no experts in it" in none.stderr and not (tmp_path / "of-empty").exists()
    assert "the expert french: it is refused (not_finite): " in odd.stderr and "take it out" in odd.stderr
    assert "the expert french: it is the same as again" in twice.stderr


def test_a_method_whose_result_does_not_fit_is_left_out(tmp_path: Path) -> None:
    """The experts are good, and other methods take them."""
    base = {"layers.0.weight": torch.full((8, 8), 40_000, dtype=torch.float16)}
    (tmp_path / "experts").mkdir()
    save_file(base, tmp_path / "base.safetensors")
    for place in (1, 2):
        moved = {name: tensor + 1000 * place * torch.eye(8).half() for name, tensor in base.items()}
        save_file(moved, tmp_path / f"experts/{place}.safetensors")
    (tmp_path / "score.sh").write_text("echo '{\"a\": 1}'")
    grid = {"methods": "task_arithmetic", "set": "task_arithmetic.scale=0.3,10", "orders": 1}
    done = study(tmp_path, **grid, base="base.safetensors", evaluate="sh score.sh {folder}")
    assert done.returncode == 0, done.stderr
    found = said(tmp_path)
    assert [one["label"] for one in found["methods"]] == ["task_arithmetic scale=0.3"]
    assert [one["label"] for one in found["left_out"]] == ["task_arithmetic scale=10"]
    assert "does not fit into float16" in found["left_out"][0]["why"] and "left out: " in done.stdout
