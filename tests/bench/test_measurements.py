"""Each measurement runs end to end on tiny shapes, without the other tools. No time is held against anything."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import clip_shapes, llama_shapes
from bench.report import ROWS, document, results
from bench.shapes import write


def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, *words: str) -> dict[str, Any]:
    """The figures that `python -m bench.NAME WORDS` writes; whatever else it made is gone."""
    for variable in ("FUSIONBENCH_PYTHON", "MERGEKIT_PYTHON"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("bench.live.STEADY_SECONDS", 0.5)
    before = sorted(tmp_path.iterdir())
    out = tmp_path / "results"
    monkeypatch.setattr(sys, "argv", [name, *words, "--out", str(out)])
    importlib.import_module(f"bench.{name}").main()
    assert sorted(tmp_path.iterdir()) == sorted([*before, out])
    assert str(tmp_path) not in (out / f"{name}.json").read_text()
    found: dict[str, Any] = json.loads((out / f"{name}.json").read_text())["figures"]
    table = document(results(out)).splitlines()
    for row in ROWS:
        if row.source == name:
            assert not any(line.startswith(f"| {row.work} |") and row.absent in line for line in table)
    return found


@pytest.fixture
def clip(tmp_path: Path) -> str:
    write(tmp_path / "clip", 4, 0, clip_shapes.SMALL.model())
    return str(tmp_path / "clip")


def test_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: str) -> None:
    found = measured(monkeypatch, tmp_path, "download", clip, "--experts", "3", "--repeats", "2", "--pulls", "6")
    assert len(found["mainstem"]) == len(found["bare"]) == len(found["cp"]) == 2
    many = found["parallel"]
    assert many["wrong"] == 0
    assert many["pulls"] >= 6
    assert max(many["versions"]) == 3


@pytest.mark.slow
def test_opcm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: str) -> None:
    found = measured(monkeypatch, tmp_path, "opcm", clip, "--experts", "4")
    assert len(found["backlog"]["seconds"]) == len(found["ready"]["seconds"]) == 2
    assert found["backlog"]["phases"]["project"] > 0
    assert found["fusionbench"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:::transformers")
def test_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    found = measured(monkeypatch, tmp_path, "hub", str(tmp_path / "work"), "--hidden", "64", "--repeats", "1")
    assert found["cold"]["bytes"] > found["new_version"]["bytes"] > found["again"]["bytes"] == 0
    assert len(found["hf"]) == len(found["pull"]) == len(found["cp"]) == 1


@pytest.mark.slow
def test_mean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clip: str) -> None:
    found = measured(monkeypatch, tmp_path, "mean", clip, "--experts", "3")
    assert len(found["floor"]) == len(found["merge"]) == len(found["arrival"]) == 2
    assert found["state_bytes"] > found["model_bytes"] // 2


@pytest.mark.slow
def test_llama(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "llama", 4, 0, llama_shapes.SMALL.model())
    found = measured(monkeypatch, tmp_path, "llama", str(tmp_path / "llama"), "--repeats", "1")
    assert found["task_arithmetic"]["mainstem"]["median"] > 0
    assert found["task_arithmetic"]["mergekit"] is None


@pytest.mark.slow
def test_growth_with_the_experts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measured(monkeypatch, tmp_path, "growth_experts", str(tmp_path), "--experts", "3")
    assert [mark["experts"] for mark in found["marks"]] == [2, 3]
    assert len(found["seconds"]) == 2


@pytest.mark.slow
def test_starting_and_ending(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "llama", 2, 0, llama_shapes.SMALL.model())
    found = measured(monkeypatch, tmp_path, "restart", str(tmp_path / "llama"), "--turns", "1")
    assert all(found["median"].values())


@pytest.mark.slow
def test_the_gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measured(monkeypatch, tmp_path, "gate", str(tmp_path), "--experts", "7", "--layers", "1")
    assert len(found["seconds"]["without"]) == len(found["seconds"]["trivial"]) == 2
    assert found["bytes"]["trivial"] > found["bytes"]["without"]


@pytest.mark.slow
def test_a_scrape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measured(monkeypatch, tmp_path, "scrape", str(tmp_path), "--heads", "1", "2")
    one, two = found["scrapes"]
    assert one["bytes"] < two["bytes"] and one["series"] < two["series"]


@pytest.mark.slow
def test_growth_with_the_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = measured(monkeypatch, tmp_path, "growth_size", str(tmp_path), "--layers", "1", "2", "--experts", "3")
    small, large = found["sizes"]
    assert large["model_bytes"] > 1.5 * small["model_bytes"]


def test_webhooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.webhooks.COMMITS", 3)
    monkeypatch.setattr("bench.webhooks.BLOCK", 4)
    found = measured(monkeypatch, tmp_path, "webhooks", str(tmp_path), "--events", "8")
    assert (found["rows"], found["dropped"]) == (8, 0)
    assert found["latency_seconds"] > 0 and found["event_cpu_seconds"] > 0
