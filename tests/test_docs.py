"""The documentation cannot drift: its generated parts are compared with the code, its commands are run."""

import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric

from daemon.cli.app import app
from daemon.config import described
from daemon.errors import Reason as DaemonReason
from daemon.metrics import NOT_OF_EXPERTS, Metrics
from projector.errors import Reason as ProjectorReason

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def between(text: str, name: str) -> str:
    """The part of a document that is generated."""
    found = re.search(rf"<!-- {name}: [^\n]*-->\n(.*)<!-- /{name} -->", text, re.DOTALL)
    assert found, f"no part {name}"
    return found[1]


def settings_table() -> str:
    rows = [f"| `{name}` | `{default}` | {text} |" for name, default, text in described()]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows]) + "\n"


def metrics_table() -> str:
    def row(metric: Metric) -> str:
        name = metric.name + ("_total" if metric.type == "counter" else "_info" if metric.type == "info" else "")
        return f"| `{name}` | {metric.type} | {metric.documentation} |"

    metrics = [metric for metric in Metrics().registry.collect() if metric.name.startswith("mainstem_")]
    return "\n".join(["| metric | type | meaning |", "|---|---|---|", *(row(metric) for metric in metrics)]) + "\n"


def test_the_settings_in_the_readme_are_the_codes() -> None:
    assert between(README, "settings") == settings_table()


def test_the_metrics_in_the_docs_are_the_codes() -> None:
    assert between((ROOT / "docs/metrics.md").read_text(), "metrics") == metrics_table()


def test_every_reason_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/refusals.md").read_text(), re.MULTILINE))
    assert documented == {*map(str, DaemonReason), *map(str, ProjectorReason)} - NOT_OF_EXPERTS


def test_every_command_is_in_the_readme() -> None:
    verbs = {command.name for command in app.registered_commands} | {group.name for group in app.registered_groups}
    assert verbs == set(re.findall(r"^\| `mainstem (\w+)", README, re.MULTILINE))


def test_every_address_is_documented() -> None:
    source = (ROOT / "daemon/http/app.py").read_text()
    routes = set(re.findall(r'Route\("([^"]+)"', source))
    documented = re.findall(r"^\| `(/[^`]*)` \|", (ROOT / "docs/http.md").read_text(), re.MULTILINE)
    plain = {re.sub(r":\w+}", "}", route) for route in routes}
    assert plain == set(documented)


def test_the_prometheus_configuration_is_the_one_that_ships() -> None:
    shown = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert shown
    assert shown[1] == (ROOT / "deploy/prometheus.yml").read_text()


def test_the_readmes_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!https)([^)]+)\)", README):
        assert (ROOT / link).exists(), link


def commands(prefix: str) -> list[str]:
    """The lines of the README's shell blocks that begin with `prefix`."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith(prefix)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.timeout(240)
def test_the_readmes_commands_run(tmp_path: Path) -> None:
    """The own-model quick start, the further heads, the fetching and the command line, in their order."""
    if not shutil.which("curl"):
        pytest.skip("the README fetches with curl, which is not installed")
    transformers_base(tmp_path)
    port = free_port()
    (tmp_path / "bin").mkdir()
    for name, module in (("mainstem", "-m daemon"), ("python", "")):
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "MAINSTEM_HTTP__PORT": str(port),
    }

    def run(line: str) -> None:
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    own = next(
        block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "mainstem run --home home &" in block
    )
    daemon = None
    try:
        for line in own.splitlines():
            if line.endswith("&"):
                daemon = subprocess.Popen(["bash", "-c", f"exec {line[:-1]}"], cwd=tmp_path, env=environment)
                wait_for(port)
            else:
                run(line)
        for line in commands("curl"):
            run(line.replace("curl -s", "curl -fs").replace("8765", str(port)))
        assert (tmp_path / "model.safetensors").stat().st_size > 0
        for line in commands("mainstem"):
            if line not in own:
                run(line)
    finally:
        if daemon is not None:
            daemon.terminate()
            assert daemon.wait(30) == 0


def transformers_base(folder: Path) -> None:
    """`my-model` and `my-finetune`, as save_pretrained writes them."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=99)
    )
    model.save_pretrained(folder / "my-model")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "my-finetune")


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError("the daemon did not listen")
