"""Sidecars from the program that makes them to the merge that needs them, and what is refused before it is read."""

import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.home import Home
from registry.records import Expert, Status
from tests.daemon.homes import assert_close, drain, experts, latest, make_home, reason_of
from tests.daemon.processes import environment, forked, mainstem
from tests.models import WEIGHTS, read_weights, write_base, write_expert
from tests.oracles_sidecars import fisher, regmean

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "sidecars.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    from docs.examples import sidecars

    return sidecars


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example writes when it is run as its docstring says."""
    folder = tmp_path_factory.mktemp("work")
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLE, folder],
        env=environment({"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def second(work: Path, example: ModuleType) -> Path:
    """Another expert on the same base, with its sidecars and no expert.json to speak of."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(work / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(work / "second")
    example.write_sidecars(model, example.counting(7, 3), work / "second", {})
    return work / "second"


def test_what_the_example_writes_is_merged_by_its_sidecars(work: Path, second: Path, tmp_path: Path) -> None:
    """The commands of its docstring, with a second head and a second expert."""
    home = Home(tmp_path / "home")
    heads = ("--method", "fisher", "--head", "linear=regmean")
    assert forked("init", home.root, "--base", work / "base", *heads).returncode == 0
    shutil.copytree(work / "expert", home.inbox / "expert")
    done = mainstem("run", "--home", home.root, "--once", "--no-http")
    assert done.returncode == 0, done.stderr
    shutil.copytree(second, home.inbox / "second")
    drain(home)
    first, other = experts(home)
    assert (first.status, first.weight, other.status, other.weight) == (Status.MERGED, 2, Status.MERGED, 1)
    assert first.about == {
        "name": "fives",
        "task": "counting in fives",
        "weight": 2,
        "trained_from": "main/0",
    }
    base, given, counts = load_file(work / "base" / WEIGHTS), [work / "expert", second], [2.0, 1.0]
    arrived = [load_file(folder / WEIGHTS) for folder in given]
    fishers = [load_file(folder / "fisher.safetensors") for folder in given]
    grams = [load_file(folder / "gram.safetensors") for folder in given]
    assert_close(latest(home), fisher(base, arrived, fishers, counts), tolerance=1e-5)
    assert_close(latest(home, "linear"), regmean(base, arrived, grams, counts), tolerance=1e-5)
    for name in ("fisher.safetensors", "gram.safetensors", "expert.json"):
        assert (home.archive(1) / "expert" / name).read_bytes() == (work / "expert" / name).read_bytes()


def test_an_expert_without_the_sidecar_is_refused_and_told_what_to_do(work: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", work / "base", [("main", "fisher", {})])
    shutil.copytree(work / "expert", home.inbox / "folder", ignore=shutil.ignore_patterns("fisher.*"))
    shutil.copy(work / "expert" / WEIGHTS, home.inbox / "file.safetensors")
    done = mainstem("run", "--home", home.root, "--once", "--no-http")
    assert done.returncode == 0, done.stderr
    for expert in experts(home):
        assert (expert.status, expert.reason) == (Status.QUARANTINED, "missing_sidecar")
        assert expert.detail == "fisher.safetensors is missing, which a method of this home needs"
        assert "docs/sidecars.md" in (expert.hint or "")
        entry = next(path for path in home.quarantine(expert.id).iterdir() if path.name != "reason.json")
        found = forked("inspect", entry, "--home", home.root)  # the dry run says the same
        assert found.returncode == 1 and "missing_sidecar" in found.stdout
    assert len(experts(home)) == 2


def sides(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.square() for name, tensor in weights.items() if tensor.is_floating_point()}


@pytest.fixture(scope="module")
def fisher_home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("fisher")
    return make_home(root / "home", write_base(root / "base", seed=1), [("main", "fisher", {})])


def arrive(home: Home, tmp_path: Path, lay: Callable[[Path, dict[str, Tensor]], None]) -> Expert:
    """Drops an expert whose fisher.safetensors is what `lay` makes of a good one's tensors; what became of it."""
    folder = write_expert(tmp_path / "expert", home.latest("main"), 2)
    lay(folder / "fisher.safetensors", sides(read_weights(folder)))
    shutil.move(folder, home.inbox / folder.name)
    drain(home)
    return experts(home)[-1]


@pytest.mark.parametrize(
    ("lay", "reason", "detail"),
    [
        (
            lambda path, good: save_file({**good, "layers.0.norm.weight": torch.ones(16).int()}, path),
            "bad_sidecar",
            "fisher.safetensors has 1 tensors of whole numbers: layers.0.norm.weight",
        ),
        (
            lambda path, good: save_file({**good, "model.a\x1b[2J": torch.ones(2), "zz": torch.ones(1)}, path),
            "bad_sidecar",
            "fisher.safetensors has 2 names that are not the base's: model.a\\x1b[2J, zz",
        ),
        (
            lambda path, good: save_file({**good, "position_ids": torch.ones(16)}, path),
            "bad_sidecar",
            "fisher.safetensors has 1 names that are not the base's: position_ids",
        ),
        (
            lambda path, good: save_file({k: v for k, v in good.items() if k != "layers.0.norm.weight"}, path),
            "bad_sidecar",
            "fisher.safetensors has nothing for layers.0.norm.weight",
        ),
        (
            lambda path, good: save_file({**good, "layers.0.norm.weight": torch.ones(8)}, path),
            "bad_sidecar",
            "the Fisher of layers.0.norm.weight has shape [8] instead of [16]",
        ),
        (
            lambda path, good: save_file({**good, "layers.0.norm.weight": -torch.ones(16)}, path),
            "bad_sidecar",
            "the Fisher of layers.0.norm.weight has values that are negative, NaN or infinite",
        ),
        (lambda path, good: path.write_bytes(pickle.dumps(0)), "pickle", "fisher.safetensors is pickled"),
        (lambda path, good: path.write_bytes(b"{}" * 50), "bad_header", "fisher.safetensors: "),
        (lambda path, good: path.write_bytes(b"\0" * 3), "truncated", "fisher.safetensors: "),
        (lambda path, good: path.symlink_to("/etc/passwd"), "symlink", "fisher.safetensors is a symbolic link"),
        (lambda path, good: path.mkdir(), "not_a_file", "fisher.safetensors is neither"),
    ],
)
def test_a_bad_sidecar_is_refused_by_name(
    lay: Callable[[Path, dict[str, Tensor]], None], reason: str, detail: str, fisher_home: Home, tmp_path: Path
) -> None:
    expert = arrive(fisher_home, tmp_path, lay)
    assert (expert.status, expert.reason) == (Status.QUARANTINED, reason), expert.detail
    assert (expert.detail or "").startswith(detail)
    assert expert.hint and reason_of(fisher_home, expert)["hint"] == expert.hint


def test_a_sidecar_may_name_layers_and_be_of_any_floating_dtype(fisher_home: Home, tmp_path: Path) -> None:
    def lay(path: Path, good: dict[str, Tensor]) -> None:
        save_file({name.removesuffix(".weight"): tensor.double() for name, tensor in good.items()}, path)

    assert arrive(fisher_home, tmp_path, lay).status is Status.MERGED


def test_sidecars_that_no_method_needs_are_neither_weights_nor_opened(home: Home, base: Path, tmp_path: Path) -> None:
    folder = write_expert(tmp_path / "expert", base, 2)
    (folder / WEIGHTS).rename(folder / "tuned.safetensors")
    (folder / "fisher.safetensors").write_bytes(b"no safetensors at all")
    (folder / "gram.safetensors").symlink_to("/dev/null")
    shutil.move(folder, home.inbox / "expert")
    drain(home)
    (expert,) = experts(home)
    assert (expert.status, expert.kind) == (Status.MERGED, "folder"), expert.detail
