"""The rules that ship, by Prometheus' own tools: the alerts fire for what they say, and not for anything else."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon.home.condition import DOINGS
from daemon.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus/rules.yml"
TESTS = DEPLOY / "prometheus/rules_test.yml"
PAGES = {"MainstemDown", "MainstemStalled", "MainstemDiskFull", "MainstemDamaged"}
IDLE = {
    "mainstem_inbox_settled": "0x300",
    "mainstem_inbox_scan_timestamp_seconds": "60+60x300",
    "mainstem_last_success_timestamp_seconds": "-400000x300",  # days ago
    "mainstem_merge_progress_timestamp_seconds": "-400000x300",
    'mainstem_condition{doing="paused"}': "0x300",
    "mainstem_disk_full": "0x300",
    'mainstem_trouble{reason="disk_full"}': "0x300",
    'mainstem_trouble{reason="damaged"}': "0x300",
    'mainstem_trouble{reason="stuck"}': "0x300",
    'mainstem_trouble{reason="registry"}': "0x300",
    'mainstem_trouble{reason="uploads"}': "0x300",
    "mainstem_disk_free_bytes": "1000000000000x300",
    "mainstem_registry_busy": "0x300",
    'mainstem_experts_total{outcome="merged"}': "3x300",
    'mainstem_experts_total{outcome="quarantined"}': "3x300",
    'mainstem_refused_total{reason="pickle"}': "3x300",
    'mainstem_refused_total{reason="norm_outlier"}': "3x300",
    "mainstem_quarantine_open": "3x300",
    'mainstem_experts_flagged_total{flag="long"}': "3x300",
    'mainstem_experts_flagged_total{flag="resized"}': "3x300",
    'mainstem_head_newest_version{head="main"}': "7x300",
    'mainstem_head_version{head="main"}': "7x300",
    'mainstem_head_score{head="main",task="a",better="higher"}': "0.8x300",
    'mainstem_head_score{head="main",task="b",better="lower"}': "0.2x300",
    'mainstem_evaluations_total{outcome="failed"}': "3x300",
    'mainstem_uploads_total{outcome="broken"}': "3x300",
    'mainstem_http_requests_total{route="/readyz",status="200"}': "0+4x300",
    "mainstem_webhook_dead_letters": "0x300",
    "process_resident_memory_bytes": "400000000x300",
    "mainstem_memory_ready_bytes": "300000000x300",
    "mainstem_memory_budget_bytes": "1000000000x300",
    "mainstem_config_last_reload_successful": "1x300",
    "up": "1x300",
}
"""A sample a minute, five hours."""

NOTHING = {
    "nothing arrives for days": {},
    "after days one arrives, and is merged five minutes later": {
        "mainstem_inbox_settled": "0x100 1x5 0x200",
        "mainstem_last_success_timestamp_seconds": "-400000x105 6400x200",
        'mainstem_experts_total{outcome="merged"}': "3x105 4x200",
    },
    "the first of a home waits its five minutes": {
        "mainstem_inbox_settled": "0x100 1x5 0x200",
        "mainstem_last_success_timestamp_seconds": "0x105 6400x200",
        "mainstem_merge_progress_timestamp_seconds": "0x105 6400x200",
    },
    "a queue that is being worked on for hours": {
        "mainstem_inbox_settled": "9x300",
        "mainstem_inbox_scan_timestamp_seconds": "60x300",
        "mainstem_last_success_timestamp_seconds": "0+600x300",
        "mainstem_merge_progress_timestamp_seconds": "0+60x300",
    },
    "one that takes three hours, at an evaluator that says nothing": {
        "mainstem_inbox_settled": "0x50 1x180 0x100",
        "mainstem_inbox_scan_timestamp_seconds": "60+60x50 3060x179 13860+60x100",
        "mainstem_merge_progress_timestamp_seconds": "-400000x50 3060+60x250",
    },
    "paused, with work waiting": {"mainstem_inbox_settled": "9x300", 'mainstem_condition{doing="paused"}': "1x300"},
    "another program looks at the registry for a moment": {"mainstem_registry_busy": "0x100 1x2 0x200"},
    "scores that rise": {
        'mainstem_head_score{head="main",task="a",better="higher"}': "0.5x100 0.8x200",
        'mainstem_head_score{head="main",task="b",better="lower"}': "0.3x100 0.2x200",
    },
    "a probe that is told of a full disk while somebody makes room": {
        'mainstem_http_requests_total{route="/readyz",status="503"}': "0x100 0+4x200"
    },
}


def alerts() -> dict[str, dict[str, Any]]:
    """Every alert by its name."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def named(text: str) -> set[str]:
    """The metrics that an expression names."""
    return set(re.findall(r"(?<!instance:)\b(?:mainstem|process)_\w+", text))


def test_they_speak_of_metrics_that_there_are() -> None:
    every = list(Metrics().registry.collect())
    ours = {sample.name for metric in every for sample in metric.samples}
    ours |= {metric.name for metric in every if metric.type in ("gauge", "histogram")}  # one of heads has no sample yet
    ours |= {f"{metric.name}{end}" for metric in every for end in ("_total", "_bucket", "_count", "_sum")}
    groups = yaml.safe_load(RULES.read_text())["groups"]
    told = set().union(*(named(rule["expr"]) for group in groups for rule in group["rules"]))
    assert told and told <= ours
    assert set().union(*(named(series) for series in IDLE)) <= ours
    recorded = {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    assert set(re.findall(r"instance:[\w:]+", "".join(rule["expr"] for rule in alerts().values()))) <= recorded


def test_each_has_a_severity_the_homes_name_and_a_page() -> None:
    for name, alert in alerts().items():
        assert alert["labels"] == {"severity": "page" if name in PAGES else "ticket"}, name
        said = alert["annotations"]
        assert said["summary"].startswith("{{ $labels.instance }}: ") and said["summary"].endswith("."), name
        assert said["runbook_url"] == f"docs/runbook.md#{name.lower()}"


def test_each_is_tested_to_fire_and_not_to_fire() -> None:
    tests = {test["name"]: test["alert_rule_test"] for test in yaml.safe_load(TESTS.read_text())["tests"]}
    assert tests.keys() == alerts().keys()
    for name, told in tests.items():
        assert {one["alertname"] for one in told} == {name}
        assert [bool(one["exp_alerts"]) for one in told] == [False, True], name


def test_what_silences_one_is_a_word_of_ours() -> None:
    words = set(DOINGS)
    for alert in alerts().values():
        for said in re.findall(r'doing=~?"([^"]+)"', alert["expr"]):
            assert set(said.split("|")) <= words


def _labelled(series: str, labels: str) -> str:
    return f"{series[:-1]},{labels}}}" if "{" in series else f"{series}{{{labels}}}"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_they_fire_for_what_they_say_and_for_nothing_else(tmp_path: Path) -> None:
    quiet = {  # one run over all: each is an instance
        "interval": "1m",
        "input_series": [
            {"series": _labelled(series, f'instance="{name}",job="mainstem"'), "values": values}
            for name, samples in NOTHING.items()
            for series, values in (IDLE | samples).items()
        ],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname, instance) (ALERTS{alertstate="firing"})',
                "eval_time": f"{minute}m",
                "exp_samples": [],
            }
            for minute in (100, 104, 106, 160, 200, 250, 299)
        ],
    }
    file = tmp_path / "tests.yml"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [quiet]}))
    done = subprocess.run(["promtool", "test", "rules", TESTS, file], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_its_configuration() -> None:
    command = ["promtool", "check", "config", DEPLOY / "prometheus/prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool is not installed")
def test_alertmanager_takes_its_configuration_and_routes_by_severity() -> None:
    file = DEPLOY / "alertmanager/alertmanager.yml"
    done = subprocess.run(["amtool", "check-config", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    for severity in ("page", "ticket"):
        route = ["amtool", "config", "routes", "test", f"--config.file={file}", f"severity={severity}"]
        assert subprocess.run(route, capture_output=True, text=True, timeout=60).stdout.split() == [severity]


def test_no_ticket_keeps_a_page_back() -> None:
    for rule in yaml.safe_load((DEPLOY / "alertmanager/alertmanager.yml").read_text())["inhibit_rules"]:
        sources, targets = (
            set().union(*(re.findall(r"Mainstem\w+", one) for one in rule[f"{side}_matchers"]))
            for side in ("source", "target")
        )
        assert (sources | targets) - alerts().keys() <= {"Mainstem"}  # of "Mainstem.+"
        assert sources <= PAGES or not targets & PAGES
