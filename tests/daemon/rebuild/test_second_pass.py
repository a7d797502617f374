"""`mainstem rebuild` with a method that makes two passes, against the offline method."""

import json
from pathlib import Path

import pytest

from daemon.layout import Home
from tests.daemon.homes import assert_close, drain, latest, live, put
from tests.daemon.processes import rebuild
from tests.daemon.rebuilds import assert_merged_like, check, killed, soup, weights
from tests.models import read_weights, write_expert
from tests.oracles.pcb import pcb, pcb_on_arrival


def test_a_new_head_of_pcb_is_the_offline_method_and_the_next_expert_makes_it_approximate(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    rebuild(merged, "--head", "best", "--method", "pcb", "--set", "ratio=0.3")
    assert_merged_like(latest(merged, "best"), pcb(*weights(model, 0, 1, 2, 3), 0.3), model)
    assert json.loads(merged.manifest("best", 4).read_bytes())["approximate"] is False
    put(merged, write_expert(tmp_path / "e.safetensors", model[0], 9))
    drain(merged)
    assert live(merged, "best") == 5
    assert json.loads(merged.manifest("best", 5).read_bytes())["approximate"] is True
    rebuild(merged, "--without", "5")
    assert json.loads(merged.manifest("best", 6).read_bytes())["approximate"] is False
    assert_merged_like(latest(merged, "best"), pcb(*weights(model, 0, 1, 2, 3), 0.3), model)
    check(merged)


def test_a_new_home_with_pcb_has_one_version_more_for_its_second_pass(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Home(tmp_path / "new")
    words = ("--into", target.root, "--method", "pcb", "--head", "soup=mean")
    killed(monkeypatch, "commit.before=kill:5", merged, *words)
    assert live(target) == 4
    for _ in range(2):  # the second time there is nothing left to do
        rebuild(merged, *words)
        assert live(target) == live(target, "soup") == 5
        assert_merged_like(latest(target), pcb(*weights(model, 0, 1, 2, 3)), model)
        assert_close(latest(target, "soup"), soup(model, [0, 1, 2, 3]))
        check(target)
    assert_merged_like(read_weights(target.version("main", 4)), pcb_on_arrival(*weights(model, 0, 1, 2, 3)), model)
