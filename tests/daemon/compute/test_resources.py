"""What the settings of [compute] mean on this machine."""

import os
from pathlib import Path
from shutil import copytree
from threading import Event

import pytest
import torch
from safetensors.torch import save_file

from daemon.compute import resources
from daemon.compute.progress import Progress
from daemon.compute.resources import (
    budget_for,
    check_budget,
    device,
    driver,
    eigh_seconds,
    faster_on_card,
    memory_budget,
)
from daemon.config import Compute
from daemon.errors import BadConfig
from daemon.home.presets import DEFAULT_METHOD
from daemon.layout import Home
from daemon.merge.merger import Merger
from projector.driver.steps import Step, fold_bytes
from projector.methods import make
from projector.spec import TensorSpec
from registry.store import Store
from tests.daemon.homes import drain, live, put, quick
from tests.daemon.processes import forked
from tests.models import write_expert

PHYSICAL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_by_default_half_of_the_usable_memory_may_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    monkeypatch.setattr(resources, "MY_CGROUPS", tmp_path / "mine")
    (tmp_path / "mine").write_text("0::/system.slice/mainstem.service\n")
    unit = tmp_path / "system.slice" / "mainstem.service"
    unit.mkdir(parents=True)
    limit = unit / "memory.max"
    assert memory_budget(Compute()) == PHYSICAL // 2
    limit.write_text("max\n")
    assert memory_budget(Compute()) == PHYSICAL // 2
    limit.write_text("1000000000\n")
    assert memory_budget(Compute()) == 500_000_000
    (unit.parent / "memory.max").write_text("800000000\n")  # a limit above it counts as well
    assert memory_budget(Compute()) == 400_000_000
    assert memory_budget(Compute.model_validate({"memory_budget": "64MB"})) == 64_000_000


def test_the_driver_gets_what_the_settings_say() -> None:
    made = driver(Compute.model_validate({"threads": 3, "memory_budget": "1GiB", "device": "cpu"}))
    assert (made.workers, made.budget_bytes, made.device.where.type) == (3, 1 << 30, "cpu")


def test_a_base_whose_largest_matrix_does_not_fit_is_refused_at_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base.safetensors"
    save_file({"small.weight": torch.zeros(4, 4), "large.weight": torch.zeros(600, 500)}, base)
    spec = TensorSpec("large.weight", (600, 500), torch.float32)
    need = fold_bytes([make(DEFAULT_METHOD)], Step(spec))
    monkeypatch.setenv("MAINSTEM_COMPUTE__MEMORY_BUDGET", str(need - 1))
    refused = forked("init", tmp_path / "home", "--base", base)
    assert refused.returncode == 1 and not (tmp_path / "home").exists()
    for part in ("large.weight", "[600, 500]", str(need), str(need - 1), "compute.memory_budget"):
        assert part in refused.stderr
    monkeypatch.setenv("MAINSTEM_COMPUTE__MEMORY_BUDGET", str(need))
    assert forked("init", tmp_path / "home", "--base", base).returncode == 0


def test_a_budget_lowered_later_stops_the_start(home: Home) -> None:
    low = quick(compute={"memory_budget": 1000})
    with Store.open(home.registry) as store, pytest.raises(BadConfig, match="1000"):
        Merger(home, store, low, Progress(Event(), lambda share: None))


def test_a_refused_start_leaves_the_home_as_cleanly_stopped(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    assert forked("run", "--once", "--no-http", "--home", home.root).returncode == 0
    monkeypatch.setenv("MAINSTEM_COMPUTE__MEMORY_BUDGET", "1000")
    assert forked("run", "--once", "--no-http", "--home", home.root).returncode == 1
    assert home.clean.exists()


def test_a_budget_for_one_matrix_at_a_time_gives_the_same_bits(home: Home, base: Path, tmp_path: Path) -> None:
    tight = Home(copytree(home.root, tmp_path / "tight", symlinks=True))
    schema = {"layers.0.down.weight": TensorSpec("layers.0.down.weight", (16, 32), torch.float32)}  # its largest
    need = fold_bytes([make("opcm")], Step(schema["layers.0.down.weight"]))
    check_budget(schema, [make("opcm")], Compute.model_validate({"memory_budget": need}))
    for seed in (2, 3):
        for one, settings in ((home, quick()), (tight, quick(compute={"memory_budget": need, "threads": 4}))):
            put(one, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
            drain(one, settings)
    weights = [(one.version("main", 2) / "model.safetensors").read_bytes() for one in (home, tight)]
    assert live(home) == live(tight) == 2 and weights[0] == weights[1]


def test_a_card_is_chosen_where_it_is_faster_than_all_workers_together() -> None:
    assert faster_on_card(0.18, 0.02, workers=4)
    assert not faster_on_card(0.18, 0.06, workers=4), "three at a time here, and more"
    assert not faster_on_card(0.18, 1.5, workers=1), "its float64 is a 64th of its float32"
    assert eigh_seconds(torch.device("cpu"), side=64) > 0


def test_an_explicit_device_is_obeyed_or_refused() -> None:
    assert device(Compute(device="cpu")).where == torch.device("cpu")
    with pytest.raises(BadConfig, match="torch sees 0 CUDA devices"):
        device(Compute(device="cuda:3"))
    assert device(Compute(device="auto")).where == torch.device("cpu"), "there is none to be seen"


def test_what_the_slabs_take_is_counted(tmp_path: Path) -> None:
    schema = {"large.weight": TensorSpec("large.weight", (600, 500), torch.float32)}
    need = fold_bytes([make("opcm")], Step(schema["large.weight"]))
    settings = Compute.model_validate({"memory_budget": need})
    check_budget(schema, [make("opcm")], settings)
    with pytest.raises(BadConfig, match=str(need - 1)) as caught:
        check_budget(schema, [make("opcm")], settings, reserved=1)
    enough = budget_for(need, 1)
    assert f"compute.memory_budget to {enough}" in caught.value.hint
    for size in (enough, enough + 1, 4 * enough):  # whatever is reserved of it then, a power of two
        assert size - (1 << (size // resources.SLAB_SHARE).bit_length() - 1) >= need
