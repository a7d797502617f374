"""A real Prometheus scrapes a live daemon, by the rules and for the dashboard that ship."""

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.daemon.homes import make_home, put
from tests.daemon.processes import Daemon, running, until
from tests.models import write_base, write_expert

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD = DEPLOY / "grafana/dashboards/mainstem.json"
ROWS = {"Overview", "Arrivals", "Quality", "Resources", "HTTP"}
MAY_BE_EMPTY = {"What is wrong", "What people did, a day", "alerts"}
EVALUATE = """
[evaluate]
command = ["sh", "-c", 'cat > /dev/null; echo "{\\"german\\": 0.5}"', "{folder}"]
"""


@contextmanager
def prometheus(tmp_path: Path, target: str) -> Iterator[str]:
    """The real server, scraping `target` twice a second; its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 500ms, scrape_timeout: 500ms, evaluation_interval: 1s}\n"
        f"rule_files: [{DEPLOY / 'prometheus/rules.yml'}]\n"
        "scrape_configs:\n"
        f"  - job_name: mainstem\n    static_configs: [{{targets: ['{target}']}}]\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]
    log = (tmp_path / "prometheus.log").open("wb")
    with log, subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log) as server:
        try:
            yield f"http://{address}"
        finally:
            server.terminate()
            server.wait(timeout=30)


def ask(origin: str, query: str) -> dict[str, Any] | None:
    """The one series that a query finds, None while there is none (or no server yet)."""
    try:
        answer = httpx.get(f"{origin}/api/v1/query", params={"query": query}, trust_env=False, verify=False, timeout=5)
    except httpx.TransportError:
        return None
    if answer.status_code == 503:  # it is still starting
        return None
    found = answer.json().get("data", {}).get("result", [])
    return found[0] if found else None


def value(origin: str, query: str) -> float | None:
    found = ask(origin, query)
    return float(found["value"][1]) if found else None


@dataclass(frozen=True)
class Watched:
    """A daemon that merged one expert and refused another, by a Prometheus with the rules that ship."""

    daemon: Daemon
    origin: str
    log: Path


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    base = write_base(folder / "base.safetensors", seed=1)
    home = make_home(folder / "home", base)
    home.config.write_text(EVALUATE)
    with (
        running("run", "--home", home.root, "--port", "0") as daemon,
        prometheus(folder, daemon.origin.removeprefix("http://")) as origin,
    ):
        log = folder / "prometheus.log"
        assert until(lambda: value(origin, 'up{job="mainstem"}') == 1, 60), log.read_text()
        assert until(lambda: value(origin, 'mainstem_head_version{head="main"}') == 0, 30), log.read_text()
        daemon.get("/nothing")
        put(home, write_expert(folder / "e.safetensors", base, 2))
        assert until(lambda: value(origin, 'mainstem_head_version{head="main"}') == 1, 60), log.read_text()
        (home.inbox / "bad.pt").write_bytes(b"PK\x03\x04")
        assert until(lambda: value(origin, 'mainstem_refused_total{reason="pickle"}') == 1, 60), log.read_text()
        yield Watched(daemon, origin, log)


def test_a_real_prometheus_follows_a_merge(watched: Watched) -> None:
    origin = watched.origin
    assert value(origin, 'mainstem_experts_total{outcome="merged"}') == 1
    assert value(origin, "mainstem_arrival_seconds_count") == 1
    assert (value(origin, "time() - mainstem_last_success_timestamp_seconds") or 1e9) < 120
    build = ask(origin, "mainstem_build_info")
    assert build is not None and build["metric"]["version"] and build["metric"]["device"].startswith("cpu ")
    assert value(origin, "mainstem_condition == 1") == 1
    assert value(origin, 'mainstem_http_requests_total{route="other",status="404"}') == 1


def test_every_query_of_the_dashboard_is_answered(watched: Watched) -> None:
    board = json.loads(DASHBOARD.read_text())
    queries = [(panel["title"], one["expr"]) for panel in board["panels"] for one in panel.get("targets", ())]
    assert {panel["title"] for panel in board["panels"] if panel["type"] == "row"} == ROWS and len(queries) > 40
    (homes,) = [one["query"]["query"] for one in board["templating"]["list"] if one["name"] == "instance"]
    metric = re.fullmatch(r"label_values\((\w+), instance\)", homes)
    assert metric
    queries += [("instance", metric[1]), *(("alerts", one["expr"]) for one in board["annotations"]["list"])]
    with httpx.Client(trust_env=False, verify=False, timeout=10) as client:
        for title, query in queries:
            asked = {"query": query.replace("$instance", ".+").replace("$__rate_interval", "1m")}
            said = client.get(f"{watched.origin}/api/v1/query", params=asked).json()
            assert said["status"] == "success", (title, query, said)
            assert said["data"]["result"] or title in MAY_BE_EMPTY, (title, query)


def test_the_rules_are_evaluated_and_nobody_is_woken(watched: Watched) -> None:
    def evaluated() -> list[dict[str, Any]]:
        said = httpx.get(f"{watched.origin}/api/v1/rules", trust_env=False, verify=False, timeout=10).json()
        rules = [rule for group in said["data"]["groups"] for rule in group["rules"]]
        return [] if any(rule["health"] == "unknown" for rule in rules) else rules

    rules = until(evaluated, 30)
    assert len(rules) > 20 and {rule["health"] for rule in rules} == {"ok"}, rules
    assert ask(watched.origin, 'ALERTS{severity="page"}') is None


def test_its_end_is_seen(watched: Watched) -> None:
    """The last one here: the daemon is gone then."""
    assert watched.daemon.stop() == 0
    assert until(lambda: value(watched.origin, 'up{job="mainstem"}') == 0, 30), watched.log.read_text()
