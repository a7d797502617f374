"""The metrics: their names by Prometheus' own linter, their labels closed, every series there from the start."""

import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from daemon.compute.progress import PHASES
from daemon.layout import Home
from daemon.metrics import OUTCOMES, REASONS, Metrics
from registry.records import Flag
from tests.daemon.homes import count, drain, put
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
        ("mainstem_experts_flagged_total", "flag", Flag),
        ("mainstem_merge_phase_seconds_total", "phase", PHASES),
    ):
        for value in values:
            assert registry.get_sample_value(name, {label: value}) == 0


def test_names_and_labels_are_ours_and_closed() -> None:
    allowed = {"head", "figure", "outcome", "reason", "flag", "phase", "version", "le"}
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
    spent = sum(count(metrics, "mainstem_merge_phase_seconds_total", phase=phase) for phase in PHASES)
    assert 0 < spent <= count(metrics, "mainstem_merge_seconds_sum")
    exposed = generate_latest(metrics).decode()
    for name in ("secret-name", "embed_tokens", str(tmp_path)):
        assert name not in exposed
