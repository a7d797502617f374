"""What a study tries: grids, orders, and what it says where that cannot be tried."""

import json
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from daemon.config import Admission, Evaluate
from daemon.errors import BadConfig, DaemonError
from daemon.study import planning
from daemon.study.planning import Plan, experts_in, shuffled, variants
from projector.errors import BadParameter, UnknownMethod
from tests.models import write_base, write_expert

EVALUATE = Evaluate(command=("score", "{folder}"))


def planned(base: Path, experts: Path, names: list[str], settings: Sequence[str] = ()) -> Plan:
    return planning.plan(base, experts, EVALUATE, names, settings, orders=2, seed=0, admission=Admission())


def test_a_grid_is_every_combination_once() -> None:
    found = variants(["ties", "mean"], ["ties.density=0.2,0.4,0.40", "ties.scale=1,2"])
    assert [one.label for one in found] == [
        "ties density=0.2 scale=1",
        "ties density=0.2 scale=2",
        "ties density=0.40 scale=1",
        "ties density=0.40 scale=2",
        "mean",
    ]
    assert [one.head for one in found] == ["ties_1", "ties_2", "ties_3", "ties_4", "mean"]
    assert found[3].method.params()["density"] == 0.4 and found[3].method.params()["scale"] == 2


def test_a_list_of_words_is_one_value() -> None:
    (one,) = variants(["opcm"], ["opcm.exclude=*a*,*b*"])
    assert one.method.params()["exclude"] == ["*a*", "*b*"]


def test_without_names_every_method_is_tried() -> None:
    assert {"opcm", "ema", "regmean"} < {one.head for one in variants([], [])}


@pytest.mark.parametrize(
    ("names", "settings", "error", "says"),
    [
        (["opcn"], [], UnknownMethod, "opcn"),
        (["ema"], ["ema.wait=1"], BadParameter, "wait"),
        (["ema"], ["ema.weight=0.5,2"], BadParameter, "2"),
        (["ema"], ["ema.weight"], BadConfig, "METHOD.KEY"),
        (["ema"], ["weight=0.3"], BadConfig, "METHOD.KEY"),
        (["ema"], ["ema.weight=0.3", "ema.weight=0.5"], BadConfig, "twice"),
        (["ema"], ["ties.scale=1"], BadConfig, "not tried"),
        (["ema"], ["tis.scale=1"], UnknownMethod, "tis"),
        (["ema"], [f"ema.weight={','.join(str(n / 1000) for n in range(1, 300))}"], BadConfig, "200 are the most"),
    ],
)
def test_what_cannot_be_tried_is_said(names: list[str], settings: list[str], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        variants(names, settings)
    assert getattr(raised.value, "hint", "")


def test_orders_are_as_many_as_there_are_and_the_same_again() -> None:
    names = ["a", "b", "c", "d", "e"]
    found = shuffled(names, 10, seed=3)
    assert found == shuffled(names, 10, seed=3) != shuffled(names, 10, seed=4)
    assert len(set(found)) == 10 and found[0] == tuple(names) and all(sorted(one) == names for one in found)
    assert set(shuffled(names[:3], 10, seed=0)) == set(permutations("abc"))


def test_experts_are_folders_and_weights(tmp_path: Path) -> None:
    for name in ("b.safetensors", "notes.txt", ".hidden"):
        (tmp_path / name).touch()
    with pytest.raises(BadConfig, match="1 expert in it"):
        experts_in(tmp_path)
    (tmp_path / "a").mkdir()
    assert list(experts_in(tmp_path)) == ["a", "b.safetensors"]
    with pytest.raises(BadConfig, match="no folder"):
        experts_in(tmp_path / "b.safetensors")


@pytest.mark.parametrize("words", ["python score.py", "", "score '{folder}"])
def test_a_command_without_a_folder_is_refused(words: str) -> None:
    with pytest.raises(BadConfig, match="--evaluate"):
        planning.command(words, Evaluate())


def test_a_command_is_split_as_a_shell_does() -> None:
    found = planning.command(
        "python 'my score.py' --model={folder}", Evaluate(timeout_seconds=7, require=("mean >= 1",))
    )
    assert found.command == ("python", "my score.py", "--model={folder}") and found.timeout_seconds == 7
    assert not found.require, "a study refuses no version"


def test_methods_whose_sidecars_are_missing_are_left_out_until_they_are_there(tmp_path: Path) -> None:
    base, experts = write_base(tmp_path / "base", seed=1), tmp_path / "experts"
    experts.mkdir()
    one, two = (write_expert(experts / name, base, seed) for seed, name in enumerate(("one", "two"), start=2))
    with pytest.raises(BadConfig, match=r"fisher is left out: no expert has fisher\.safetensors"):
        planned(base, experts, ["fisher"])
    fisher = {name: tensor.abs() for name, tensor in load_file(one / "model.safetensors").items() if "norm" not in name}
    save_file(fisher, one / "fisher.safetensors")
    found = planned(base, experts, ["fisher", "ema"])
    assert [one.head for one in found.variants] == ["ema"]
    assert [(left.label, left.why) for left in found.left_out] == [("fisher", "two has no fisher.safetensors")]
    save_file(fisher, two / "fisher.safetensors")  # the hint
    assert [one.head for one in planned(base, experts, ["fisher", "ema"]).variants] == ["fisher", "ema"]


def test_an_expert_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    base, experts = write_base(tmp_path / "base", seed=1), tmp_path / "experts"
    experts.mkdir()
    good = write_expert(experts / "good", base, 2)
    (experts / "bad").mkdir()
    (experts / "bad" / "model.safetensors").write_bytes((good / "model.safetensors").read_bytes()[:-7])
    with pytest.raises(DaemonError, match="the expert bad: ") as raised:
        planned(base, experts, ["ema"])
    assert "take it out" in raised.value.hint


def test_a_plan_is_known_again_by_all_that_it_tries(tmp_path: Path) -> None:
    base, experts = write_base(tmp_path / "base", seed=1), tmp_path / "experts"
    experts.mkdir()
    for seed in (2, 3):
        write_expert(experts / str(seed), base, seed)
    said = planned(base, experts, ["ema"]).described()
    assert json.loads(json.dumps(said)) == said | {"orders": [list(order) for order in said["orders"]]}
    assert said != planned(base, experts, ["ema"], ["ema.weight=0.3"]).described()
