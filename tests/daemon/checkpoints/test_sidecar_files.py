"""Sidecars from the program that makes them to the merge that needs them, and what is refused before it is read."""

import hashlib
import json
import pickle
import runpy
import shutil
import sqlite3
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.home.verification import verify
from daemon.layout import Home
from registry.records import Expert, Status
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, make_home, reason_of, tree
from tests.daemon.processes import forked, mainstem, rebuild
from tests.daemon.pulls import ended, forking
from tests.models import WEIGHTS, read_weights, write_base, write_expert
from tests.oracles.sidecars import fisher, regmean

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "docs" / "examples" / "sidecars.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    from docs.examples import sidecars

    return sidecars


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example writes when it is run as its docstring says."""
    folder = tmp_path_factory.mktemp("work")

    def run() -> None:
        torch.set_num_threads(1)  # the parent's threads are not here
        warnings.simplefilter("error")
        sys.argv = [str(EXAMPLE), str(folder)]
        runpy.run_path(str(EXAMPLE), run_name="__main__")

    with forking(run) as child:  # its imports would take longer than all that it does
        assert ended(child) == 0
    return folder


@pytest.fixture(scope="module")
def second(work: Path, example: ModuleType) -> Path:
    """Another expert on the same base, with its sidecars and no expert.json to speak of."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(1)
    model = LlamaForCausalLM.from_pretrained(work / "base")
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.01 * torch.randn_like(weight)
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
    read = {kind: digest(work / "expert" / f"{kind}.safetensors") for kind in ("fisher", "gram")}
    assert (first.sha256, first.sidecars) == (digest(work / "expert" / WEIGHTS), read)
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


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


# what is read again


@pytest.fixture(scope="module")
def merged_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the heads main (fisher) and soup (mean) and three experts; the third counts 2.5 times."""
    root = tmp_path_factory.mktemp("merged")
    base = write_base(root / "base", seed=1)
    home = make_home(root / "home", base, [("main", "fisher", {}), ("soup", "mean", {})])
    for seed, name in enumerate("abc", 2):
        folder = write_expert(root / name, base, seed)
        save_file(sides(read_weights(folder)), folder / "fisher.safetensors")
        if name == "c":
            (folder / "expert.json").write_text('{"weight": 2.5}')
        shutil.copytree(folder, home.inbox / name)
        drain(home)
    return home.root


@pytest.fixture
def merged(merged_root: Path, tmp_path: Path) -> Home:
    return Home(shutil.copytree(merged_root, tmp_path / "home", symlinks=True))


def refused(home: Home, *words: str | Path) -> str:
    """Runs the verb, which must be refused and change no version; what it complained of."""
    before = tree(home.published)
    done = forked("rebuild", "--home", home.root, *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert tree(home.published) == before
    return done.stderr


def problems(home: Home) -> list[str]:
    with lineage(home) as reader:
        return verify(home, reader, lambda what: None)[1]


def archived(home: Home, expert_id: int, name: str) -> Path:
    """A file of an archived expert."""
    (path,) = home.archive(expert_id).glob(f"*/{name}")
    return path


def spoil(path: Path) -> None:
    """Changes the last value, and no link to the same file."""
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.unlink()
    path.write_bytes(content)


def test_the_same_weights_with_another_fisher_are_a_duplicate(merged: Home, tmp_path: Path) -> None:
    shutil.copytree(archived(merged, 1, WEIGHTS).parent, merged.inbox / "again")
    spoil(merged.inbox / "again" / "fisher.safetensors")
    drain(merged)
    first, *_, twin = experts(merged)
    assert (twin.status, twin.duplicate_of, twin.sha256) == (Status.DUPLICATE, 1, first.sha256)
    assert twin.sidecars == {"fisher": digest(archived(merged, twin.id, "fisher.safetensors"))} != first.sidecars
    assert problems(merged) == []


def test_dare_draws_the_same_whatever_else_the_home_needs(merged: Home, tmp_path: Path) -> None:
    """One that was added, one that was there, and one in a home of its own drop the same values."""
    dare = ("--method", "dare")
    rebuild(merged, "--head", "thin", *dare)
    rebuild(merged, "--into", tmp_path / "all", "--method", "fisher", "--head", "thin=dare")
    rebuild(merged, "--into", tmp_path / "three", *dare)
    rebuild(merged, "--into", tmp_path / "two", *dare, "--without", "2")
    for other, head in (("all", "thin"), ("three", "main")):
        found = latest(Home(tmp_path / other), head)
        assert all(tensor.equal(found[name]) for name, tensor in latest(merged, "thin").items())
    assert "thin/4: subtracted" in rebuild(merged, "--without", "2")
    assert_close(latest(merged, "thin"), latest(Home(tmp_path / "two")))
    assert problems(merged) == problems(Home(tmp_path / "all")) == []


def test_a_sidecar_that_changed_is_found_and_not_merged_again(merged: Home, tmp_path: Path) -> None:
    assert problems(merged) == []
    sidecar = archived(merged, 2, "fisher.safetensors")
    sound = sidecar.read_bytes()
    spoil(sidecar)
    assert problems(merged) == ["archive/000002: the sha256 of its fisher.safetensors is not the registry's"]
    assert "b is not what was merged: its fisher.safetensors is another" in refused(merged, "--without", "2")
    assert "its fisher.safetensors is another" in refused(merged, "--into", tmp_path / "new")
    rebuild(merged, "--into", tmp_path / "mean", "--method", "mean")  # which does not read it
    sidecar.write_bytes(sound)
    rebuild(merged, "--without", "3")
    assert problems(merged) == []
    sidecar.unlink()
    (problem,) = problems(merged)
    assert problem.startswith("archive/000002: fisher.safetensors is missing")


@pytest.mark.parametrize("words", [{"weight": 3}, {}, {"weight": 1}])
def test_an_expert_json_that_was_edited_is_refused_before_anything_is_made(
    words: dict[str, float], merged: Home, tmp_path: Path
) -> None:
    about = archived(merged, 3, "expert.json")
    about.write_text(json.dumps(words))
    said = refused(merged, "--into", tmp_path / "new")
    assert f"merged with the weight 2.5, by {about} it has {words.get('weight', 1)}" in said
    assert not (tmp_path / "new").exists()
    assert str(about) in refused(merged, "--head", "init", "--method", "ema")
    rebuild(merged, "--without", "3")  # subtracted with the weight that it was merged with
    assert problems(merged) == []


def test_a_rotten_base_is_refused(merged: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # killed when all experts are replayed: only the result is to be taken over
        patch.setenv("MAINSTEM_FAILPOINT", "commit.after=kill:3")
        assert forked("rebuild", "--home", merged.root, "--head", "run", "--method", "ema").returncode < 0
    spoil(merged.base / WEIGHTS)
    damaged = "the base in state/base is damaged"
    (tmp_path / "mine" / "inbox").mkdir(parents=True)
    for words in (
        ("--into", tmp_path / "new"),
        ("--into", tmp_path / "mine"),
        ("--head", "init", "--method", "ema"),
        ("--head", "run", "--method", "ema"),
        ("--without", "1"),
        ("--without", "1", "--without", "2", "--without", "3"),
    ):
        assert damaged in refused(merged, *words), words
    assert not (tmp_path / "new").exists()
    assert not Home(tmp_path / "mine").exists() and (tmp_path / "mine" / "inbox").exists()


def test_a_version_that_is_taken_over_keeps_its_dtype(
    merged: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass makes one head exact; the other's files stay, whatever the settings say by then."""
    target = Home(tmp_path / "new")
    words = ("rebuild", "--home", merged.root, "--into", target.root, "--method", "pcb", "--head", "soup=mean")
    with monkeypatch.context() as patch:
        patch.setenv("MAINSTEM_FAILPOINT", "commit.before=kill:4")
        assert forked(*words).returncode < 0
    monkeypatch.setenv("MAINSTEM_PUBLISH__DTYPE", "bfloat16")
    done = forked(*words)
    assert done.returncode == 0, done.stderr
    said = {name: json.loads(target.manifest(*name).read_bytes())["dtype"] for name in (("soup", 3), ("soup", 4))}
    assert said["soup", 4] == said["soup", 3] != "bfloat16"
    assert latest(target, "soup")["embed_tokens.weight"].dtype == torch.float32
    assert json.loads(target.manifest("main", 4).read_bytes())["dtype"] == "bfloat16"
    assert problems(target) == []


def test_an_expert_that_is_on_its_way_into_the_archive_is_not_taken_for_lost(merged: Home, tmp_path: Path) -> None:
    with closing(sqlite3.connect(merged.registry)) as raw, raw:
        raw.execute("UPDATE experts SET place = NULL WHERE id = 3")
    rebuild(merged, "--into", tmp_path / "there", "--dry-run")  # moved, and only not noted
    shutil.move(merged.archive(3) / "c", merged.inbox / "c")
    said = refused(merged, "--into", tmp_path / "new")
    assert "expert 3 (c) is merged, but the daemon has not archived it yet" in said and "in a moment" in said
