"""A real Prometheus scrapes a live daemon."""

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from daemon.config import Settings
from tests.daemon.homes import make_home, put
from tests.daemon.processes import running, until
from tests.models import write_base, write_expert


@contextmanager
def prometheus(tmp_path: Path, target: str) -> Iterator[str]:
    """The real server, scraping `target` four times a second; its address."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed")
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 250ms, scrape_timeout: 250ms}\n"
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
        answer = httpx.get(f"{origin}/api/v1/query", params={"query": query}, trust_env=False, timeout=5)
    except httpx.TransportError:
        return None
    if answer.status_code == 503:  # it is still starting
        return None
    found = answer.json().get("data", {}).get("result", [])
    return found[0] if found else None


def value(origin: str, query: str) -> float | None:
    found = ask(origin, query)
    return float(found["value"][1]) if found else None


def test_a_real_prometheus_follows_a_merge(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=1)
    home = make_home(tmp_path / "home", base)
    assert Settings().http.enabled
    with (
        running("run", "--home", home.root, "--port", "0") as daemon,
        prometheus(tmp_path, daemon.origin.removeprefix("http://")) as origin,
    ):
        log = (tmp_path / "prometheus.log").read_text
        assert until(lambda: value(origin, 'up{job="mainstem"}') == 1, 60), log()
        assert until(lambda: value(origin, 'mainstem_head_version{head="main"}') == 0, 30), log()
        put(home, write_expert(tmp_path / "e.safetensors", base, 2))
        assert until(lambda: value(origin, 'mainstem_head_version{head="main"}') == 1, 60), log()
        assert value(origin, 'mainstem_experts_total{outcome="merged"}') == 1
        assert value(origin, "mainstem_arrival_seconds_count") == 1
        assert (value(origin, "time() - mainstem_last_success_timestamp_seconds") or 1e9) < 120
        (home.inbox / "bad.pt").write_bytes(b"PK\x03\x04")
        assert until(lambda: value(origin, 'mainstem_refused_total{reason="pickle"}') == 1, 60), log()
        build = ask(origin, "mainstem_build_info")
        assert build is not None and build["metric"]["version"]
        assert daemon.stop() == 0
        assert until(lambda: value(origin, 'up{job="mainstem"}') == 0, 30), log()
