"""The metrics: their names by Prometheus' own linter, their labels closed, every series there from the start."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from daemon.compute.progress import PHASES
from daemon.config import Settings
from daemon.interventions.deeds import Request, carry_out
from daemon.layout import Home
from daemon.metrics import (
    DEEDS,
    JUDGED,
    MOST_TASKS,
    OTHER,
    OUTCOMES,
    REASONS,
    TELLINGS,
    TRANSACTIONS,
    TROUBLES,
    HeadMetrics,
    Metrics,
)
from registry.records import Deed, Flag, Status
from registry.store import Store
from tests.daemon.homes import count, drain, put, quick
from tests.models import write_expert


def test_the_names_follow_the_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    exposed = generate_latest(Metrics().registry)
    checked = subprocess.run([promtool, "check", "metrics"], input=exposed, capture_output=True, timeout=60)
    assert checked.returncode == 0, checked.stdout.decode() + checked.stderr.decode()


def test_every_series_with_a_closed_label_is_there_from_the_start() -> None:
    """So that a rate or an alert does not miss the first event."""
    registry = Metrics().registry
    for name, label, values in (
        ("mainstem_experts_total", "outcome", OUTCOMES),
        ("mainstem_refused_total", "reason", REASONS),
        ("mainstem_evaluations_total", "outcome", JUDGED),
        ("mainstem_interventions_total", "deed", DEEDS),
        ("mainstem_experts_flagged_total", "flag", Flag),
        ("mainstem_merge_phase_seconds_total", "phase", PHASES),
        ("mainstem_webhook_deliveries_total", "outcome", TELLINGS),
        ("mainstem_home_experts", "status", Status),
        ("mainstem_trouble", "reason", (*TROUBLES, OTHER)),
        ("mainstem_registry_transaction_seconds_count", "kind", TRANSACTIONS),
    ):
        for value in values:
            assert registry.get_sample_value(name, {label: value}) == 0


def test_names_and_labels_are_ours_and_closed() -> None:
    allowed = {"head", "figure", "outcome", "reason", "flag", "phase", "version", "le", "task", "deed"}
    allowed |= {"better", "status", "kind", "route", "doing", "device"}
    for family in Metrics().registry.collect():
        assert family.name.startswith(("mainstem_", "process_")) and family.documentation
        for sample in family.samples:
            assert set(sample.labels) <= allowed


def test_a_run_counts_what_it_did(home: Home, base: Path, tmp_path: Path) -> None:
    expert = write_expert(tmp_path / "secret-name.safetensors", base, 2)
    shutil.copy(expert, home.inbox / "again.safetensors")
    put(home, expert)
    (home.inbox / "bad.safetensors").write_bytes(b"")
    metrics = drain(home)
    for outcome, number in {"merged": 1, "duplicate": 1, "quarantined": 1, "abandoned": 0}.items():
        assert count(metrics, "mainstem_experts_total", outcome=outcome) == number
    assert count(metrics, "mainstem_refused_total", reason="truncated") == 1
    assert count(metrics, "mainstem_head_version", head="main") == 1
    assert count(metrics, "mainstem_merge_seconds_count") == count(metrics, "mainstem_arrival_seconds_count") == 1
    assert count(metrics, "mainstem_inbox_settled") == count(metrics, "mainstem_inbox_moving") == 0
    assert count(metrics, "mainstem_disk_free_bytes") > 0 == count(metrics, "mainstem_disk_full")
    assert count(metrics, "mainstem_disk_size_bytes") >= count(metrics, "mainstem_disk_free_bytes")
    assert time.time() - 600 < count(metrics, "mainstem_inbox_scan_timestamp_seconds") <= time.time()
    assert time.time() - 600 < count(metrics, "mainstem_merge_progress_timestamp_seconds") <= time.time()
    assert count(metrics, "mainstem_home_experts", status="merged") == 1
    assert count(metrics, "mainstem_head_kept_versions", head="main") == 2
    published = [path.stat().st_size for n in (0, 1) for path in home.version("main", n).glob("*.safetensors")]
    assert sum(published) <= count(metrics, "mainstem_head_kept_bytes", head="main") < 1.5 * sum(published)
    assert count(metrics, "mainstem_fsync_seconds_count") > 10 > count(metrics, "mainstem_fsync_seconds_sum")
    for kind in TRANSACTIONS:
        assert count(metrics, "mainstem_registry_transaction_seconds_count", kind=kind) > 3
    assert count(metrics, "mainstem_memory_ready_bytes") > 50e6
    (build,) = next(family for family in metrics.collect() if family.name == "mainstem_build").samples
    assert build.labels["device"].startswith("cpu ") and build.labels["version"]
    spent = sum(count(metrics, "mainstem_merge_phase_seconds_total", phase=phase) for phase in PHASES)
    assert 0 < spent <= count(metrics, "mainstem_merge_seconds_sum")
    exposed = generate_latest(metrics).decode()
    for name in ("secret-name", "embed_tokens", str(tmp_path)):
        assert name not in exposed


SCORE = """
import json, sys
number = json.load(sys.stdin)["version"]
tasks = {f"t{n:02}": 0.5 for n in range(40)} if number == 1 else {}
print(json.dumps({"a": {0: 0.5, 1: 0.6, 2: 0.3, 3: 0.1}.get(number, 0.5), **tasks}))
"""


def gate(*rules: str, command: str = "python3 score.py {folder}") -> Settings:
    return quick(evaluate={"command": command.split(), "require": rules})


def arrives(home: Home, base: Path, seed: int, settings: Settings) -> CollectorRegistry:
    put(home, write_expert(home.root.parent / f"{seed}.safetensors", base, seed))
    return drain(home, settings)


def judged(metrics: CollectorRegistry) -> dict[str, float]:
    found = {outcome: count(metrics, "mainstem_evaluations_total", outcome=outcome) for outcome in JUDGED}
    return {outcome: number for outcome, number in found.items() if number}


def test_what_the_gate_says_is_counted_and_the_live_scores_are_shown(home: Home, base: Path) -> None:
    (home.root / "score.py").write_text(SCORE)
    main = {"head": "main"}
    metrics = arrives(home, base, 2, gate('"a" >= base'))
    assert judged(metrics) == {"live": 1} and count(metrics, "mainstem_evaluation_seconds_count") == 2
    assert count(metrics, "mainstem_head_score", task="a", better="higher", **main) == 0.6
    samples = [sample.name for family in metrics.collect() for sample in family.samples]
    assert samples.count("mainstem_head_score") == MOST_TASKS
    metrics = arrives(home, base, 3, gate('"a" >= 0.4'))
    assert judged(metrics) == {"held": 1} and count(metrics, "mainstem_head_held", **main) == 1
    assert count(metrics, "mainstem_head_version", **main) == 1 < count(metrics, "mainstem_head_newest_version", **main)
    metrics = arrives(home, base, 4, gate('"a" >= 0.4 else reject'))
    assert judged(metrics) == {"rejected": 1} and count(metrics, "mainstem_quarantine_open") == 1
    assert count(metrics, "mainstem_evaluation_seconds_count") == 1
    metrics = arrives(home, base, 5, gate(command="false {folder}"))
    assert judged(metrics) == {"failed": 1} and count(metrics, "mainstem_evaluation_seconds_count") == 0


def test_what_people_did_is_counted_and_scores_of_what_is_live_no_more_are_gone(home: Home, base: Path) -> None:
    (home.root / "score.py").write_text(SCORE)
    arrives(home, base, 2, gate('"a" >= base'))
    metrics = HeadMetrics()
    with Store.open(home.registry) as store:
        metrics.follow(store)
        shown = {"head": "main", "task": "t00", "better": "higher"}
        assert metrics.registry.get_sample_value("mainstem_head_score", shown) == 0.5
        made = metrics.registry.get_sample_value("mainstem_last_success_timestamp_seconds")
        assert carry_out(home, store, Request(Deed.ROLLBACK, "ada", head="main", version=0))
        assert metrics.registry.get_sample_value("mainstem_head_score", shown) is None
        assert metrics.registry.get_sample_value("mainstem_head_score", {**shown, "task": "a"}) == 0.5
        assert metrics.registry.get_sample_value("mainstem_head_frozen", {"head": "main"}) == 1
        assert metrics.registry.get_sample_value("mainstem_last_success_timestamp_seconds") == made
        for _ in range(2):  # each is counted once
            done = metrics.registry.get_sample_value("mainstem_interventions_total", {"deed": "rollback"})
            assert done == 1
        for n in range(60):
            for deed in (Deed.PIN, Deed.UNPIN):
                assert carry_out(home, store, Request(deed, "ada", head="main", version=1)), n
        assert metrics.registry.get_sample_value("mainstem_interventions_total", {"deed": "pin"}) == 60
        assert metrics.registry.get_sample_value("mainstem_interventions_total", {"deed": "rollback"}) == 1
