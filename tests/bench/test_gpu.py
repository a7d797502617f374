"""The script for a machine with a card, on one without: every step runs, none stops another, and all is kept."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, gpu_checks, gpu_layers
from bench.details import GPU_SUMS
from bench.record import RESULTS
from bench.report import document, results
from projector.methods import methods

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PLAN = gpu.Plan("cpu", gpu.TINY, True)


def python(script: str) -> Any:
    return lambda plan: [sys.executable, "-c", script]


def collected(found: Any) -> dict[str, Any]:
    return {key: value for line in found for key, value in json.loads(json.dumps(line)).items()}


def test_a_step_that_fails_or_hangs_keeps_what_it_found_and_stops_no_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hang = "import subprocess, sys\nprint('{\"a\": 1}', flush=True)\nsubprocess.run(['sleep', '600'])"
    steps = (
        gpu.Step("layers", 30, python("print('{\"a\": 1}'); print('noise'); print('{\"b\": 2}')")),
        gpu.Step("exact", 30, python("print('{\"a\": 1}'); raise SystemExit('it broke')")),
        gpu.Step("memory", 0.5, python(hang)),
        gpu.Step("fusionbench", 30, lambda plan: "nobody is there"),
    )
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse", "--out", str(tmp_path)])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())["figures"]["steps"]
    said = {name: (step["status"], step["why"], step["found"]) for name, step in found.items()}
    assert said == {
        "layers": ("done", "", {"a": 1, "b": 2}),
        "exact": ("failed", "it broke", {"a": 1}),
        "memory": ("failed", "it took longer than 0 s", {"a": 1}),
        "fusionbench": ("skipped", "nobody is there", {}),
    }


def test_once_the_time_is_over_the_rest_says_so() -> None:
    found = gpu.run(gpu.Step("exact", 30, python("print(1)")), PLAN, left=-1.0)
    assert (found["status"], found["why"]) == ("skipped", "no time was left")


def test_without_a_card_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(tmp_path)])
    gpu.main()
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_is_never_taken_for_a_result(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = sorted(RESULTS.iterdir())
    monkeypatch.setattr(gpu, "STEPS", (gpu.Step("exact", 30, lambda plan: "not now"),))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu", "--rehearse"])
    gpu.main()
    assert sorted(RESULTS.iterdir()) == before
    rehearsed = results(tmp_path / "bench-work" / "rehearsal")
    rehearsed["gpu"]["machine"]["others"] = 0.0
    assert "| not measured: a rehearsal on the CPU |" in document(rehearsed)


def test_every_method_is_held_against_the_cpu() -> None:
    found = collected(gpu_checks.exact(CPU, True))
    assert found.pop("fallbacks") == 0
    assert set(found) == set(methods())
    assert all(one["good"] for one in found.values())


def test_the_other_checks() -> None:
    assert collected(gpu_checks.memory(CPU, True))["beyond the budget"]["the_cpus_bits"]
    assert collected(gpu_checks.fold(CPU, True)) == {"finite": True}


def test_layers_solvers_and_ways_are_measured() -> None:
    layers = collected(gpu_layers.layers(CPU, [(24, 32)], True))
    opcm, iso_c = layers["opcm 24x32"], layers["iso_c 24x32"]
    assert opcm["flops"] and opcm["prepare"] > 0 and iso_c["prepare"] == 0
    assert set(collected(gpu_layers.eigh(CPU, [], True))) == {
        f"{side} {dtype}{many}"
        for side in (16, 32)
        for dtype in ("float64", "float32")
        for many in ("", ", 4 at a time")
    }
    assert set(collected(gpu_layers.ways(CPU, [], True))) == {"numel", "cpu", "device"}


def test_the_report_says_what_each_step_found() -> None:
    layer = {"prepare": 0.4, "update": 0.1, "read": 0.0, "floor_bytes": 0.05, "floor_flops": 0.02}
    steps: dict[str, Any] = {
        "tests": {"passed": 30, "failed": 1, "names": ["test_x"]},
        "exact": {"opcm": {"apart": 2e-7, "same_bits_again": True, "good": True}, "fallbacks": 0},
        "layers": {"bytes_per_second": 3e12, **{f"opcm {shape}": layer for shape in gpu.SHAPES}},
        "eigh": {"1024 float64": 0.02},
        "daemon": {"all on the device": {"seconds": 9.0, "merged": 3, "fallbacks": 0}},
        "memory": {"out of memory": {"fallbacks": 4, "the_cpus_bits": True}},
        "ways": {"numel": 1 << 26, "cpu": 0.2, "device": 0.1},
        "fusionbench": {"version": "0.2.33", **dict.fromkeys(gpu.SHAPES, 15.0)},
        "sanitizer": {"finite": True, "errors": 0},
    }
    assert set(steps) == set(GPU_SUMS) == {step.name for step in gpu.STEPS}
    figures: dict[str, Any] = {
        "rehearsal": False,
        "shapes": list(gpu.SHAPES),
        "steps": {n: {"status": "done", "why": "", "seconds": 1.0, "found": found} for n, found in steps.items()},
    }
    machine = {**results()["mean"]["machine"], "others": 0.0, "gpu": "a card"}
    whole = document({"gpu": {"machine": machine, "command": "x", "figures": figures}})
    assert "| >= 20x faster | backlog 30 and 30x; ready 150 and 150x, at 2 and 2 times their floor | met |" in whole
    assert "1 of 1 methods within 1e-5" in whole and "1024 float64" in whole
    for name in gpu.STEPS:  # whichever broke, the rest is still said
        broken = {**figures["steps"], name.name: {"status": "failed", "why": "a | b", "seconds": 1.0, "found": {}}}
        assert "failed: a / b" in document(
            {"gpu": {"machine": machine, "command": "x", "figures": {**figures, "steps": broken}}}
        )


def test_until_there_is_a_result_the_section_says_so() -> None:
    assert "Never run: no GPU was at hand." in document({})


def test_time_limits_leave_room_for_what_matters() -> None:
    first = [step for step in gpu.STEPS if step.name in ("tests", "exact", "layers", "eigh", "daemon")]
    assert sum(step.limit for step in first) <= gpu.ALL_SECONDS


def rehearsed(tmp_path: Path, *words: str) -> dict[str, Any]:
    ran = subprocess.run(
        [str(ROOT / "bench" / "gpu.sh"), "--rehearse", "--out", str(tmp_path), *words],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())["figures"]["steps"]
    return found


def test_the_script_runs(tmp_path: Path) -> None:
    found = rehearsed(tmp_path, "--steps", "sanitizer")
    assert found["sanitizer"]["status"] == "done" and found["sanitizer"]["found"]["finite"]


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    found = rehearsed(tmp_path)
    ended = {name: step["status"] for name, step in found.items()}
    assert ended == dict.fromkeys(ended, "done") | {"fusionbench": "skipped"}, found
    assert found["daemon"]["found"]["nothing fits on the device"]["version"] == 4
    document(results(tmp_path))
