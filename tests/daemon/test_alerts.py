"""The alerts that ship, by Prometheus' own tool: they fire for what they say, and not for anything else."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from daemon.metrics import Metrics

RULES = Path(__file__).parents[2] / "deploy/alerts.yml"
LABELS = '{instance="a",job="mainstem"}'
ALERTS = re.findall(r"alert: (\w+)", RULES.read_text())
IDLE = {
    "mainstem_inbox_settled": "0x300",
    "mainstem_last_success_timestamp_seconds": "-400000x300",  # days ago
    "mainstem_merge_progress_ratio": "0x300",
    "mainstem_disk_full": "0x300",
    "mainstem_registry_busy": "0x300",
    'mainstem_refused_total{reason="pickle"}': "3x300",
    'mainstem_experts_flagged_total{flag="long"}': "3x300",
    'mainstem_head_newest_version{head="main"}': "7x300",
    'mainstem_head_version{head="main"}': "7x300",
    "mainstem_config_last_reload_successful": "1x300",
    "up": "1x300",
}
"""A sample a minute, five hours."""

NOTHING = {
    "nothing arrives for days": {},
    "after days one arrives, and is merged five minutes later": {
        "mainstem_inbox_settled": "0x100 1x5 0x200",
        "mainstem_last_success_timestamp_seconds": "-400000x105 6400x200",
    },
    "the first of a home waits its five minutes": {
        "mainstem_inbox_settled": "0x100 1x5 0x200",
        "mainstem_last_success_timestamp_seconds": "0x105 6400x200",
    },
    "a queue that is being worked on for hours": {
        "mainstem_inbox_settled": "9x300",
        "mainstem_last_success_timestamp_seconds": "0+600x300",
    },
    "one that takes three hours": {
        "mainstem_inbox_settled": "0x50 1x180 0x100",
        "mainstem_merge_progress_ratio": "0x50 0+0.005x180 0x100",
    },
    "another program looks at the registry for a moment": {"mainstem_registry_busy": "0x100 1x2 0x200"},
}
FIRES = {
    "MainstemMergesNothing": {"mainstem_inbox_settled": "0x100 1x200"},
    "MainstemDown": {"up": "1x100 0x200"},
    "MainstemDiskFull": {"mainstem_disk_full": "0x250 1x50"},
    "MainstemRegistryBusy": {"mainstem_registry_busy": "0x250 1x50"},
    "MainstemRefused": {'mainstem_refused_total{reason="pickle"}': "3x270 4x30"},
    "MainstemFlagged": {'mainstem_experts_flagged_total{flag="long"}': "3x270 4x30"},
    "MainstemHeld": {'mainstem_head_newest_version{head="main"}': "7x200 8x100"},
    "MainstemSettingsUnread": {"mainstem_config_last_reload_successful": "1x250 0x50"},
}


def test_they_speak_of_metrics_that_there_are() -> None:
    every = list(Metrics().registry.collect())
    ours = {sample.name for metric in every for sample in metric.samples}
    ours |= {metric.name for metric in every if metric.type == "gauge"}  # one of heads has no sample yet
    named = set(re.findall(r"\bmainstem_\w+", RULES.read_text()))
    assert named and named <= ours
    assert set(FIRES) == set(ALERTS)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_they_fire_for_what_they_say_and_for_nothing_else(tmp_path: Path) -> None:
    cases = [(name, samples, []) for name, samples in NOTHING.items()]
    cases += [(name, samples, [name]) for name, samples in FIRES.items()]
    tests = [
        {
            "interval": "1m",
            "name": name,
            "input_series": [
                {"series": series[:-1] + "," + LABELS[1:] if "{" in series else series + LABELS, "values": values}
                for series, values in (IDLE | samples).items()
            ],
            "promql_expr_test": [
                {
                    "expr": f'count by (alertname) (ALERTS{{alertstate="firing",alertname="{alert}"}})',
                    "eval_time": f"{minute}m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert in firing else [],
                }
                for alert in ALERTS
                for minute in ((100, 104, 106, 160, 200, 250, 299) if not firing else (299,))
            ],
        }
        for name, samples, firing in cases
    ]
    file = tmp_path / "tests.yml"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
