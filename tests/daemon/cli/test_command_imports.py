"""A command that only reads starts quickly: it imports nothing that it does not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.layout import Home

SLOW = {"torch", "numpy", "alembic", "mako", "starlette", "uvicorn", "anyio", "prometheus_client", "jinja2"}
SLOW |= {"pydantic_settings", "structlog", "huggingface_hub", "safetensors", "httpx"}
RUN = """
import json, sys
from daemon.cli.app import app
app(sys.argv[1:], standalone_mode=False)
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def imported(*words: str) -> set[str]:
    """The packages that a command has imported when it ends."""
    run = [sys.executable, "-c", RUN, *words]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3])
    return {name.partition(".")[0] for name in json.loads(done.stderr)}


@pytest.mark.parametrize("words", [("status",), ("health",), ("log",), ("show", "v0")], ids=lambda words: words[0])
def test_reading_imports_no_more_than_it_needs(home: Home, words: tuple[str, ...]) -> None:
    found = imported(*words, "--home", str(home.root))
    assert "sqlalchemy" in found, "nothing was read"
    assert sorted(found & SLOW) == []


@pytest.mark.parametrize("words", [("rollback", "0"), ("pin", "0"), ("pause",)], ids=lambda words: words[0])
def test_what_changes_the_home_at_once_does_not_wait_for_torch(home: Home, words: tuple[str, ...]) -> None:
    found = imported(*words, "--home", str(home.root))
    assert sorted(found & SLOW - {"structlog"}) == []


def test_help_imports_not_even_the_registry() -> None:
    assert sorted(imported("--help") & (SLOW | {"sqlalchemy", "watchdog"})) == []


@pytest.mark.parametrize(
    "words", [("rollback", "0"), ("pin", "0"), ("quarantine", "list"), ("webhooks", "list")], ids=lambda words: words[0]
)
def test_what_a_person_does_at_once_waits_for_no_tensor(home: Home, words: tuple[str, ...]) -> None:
    found = imported(*words, "--home", str(home.root))
    assert sorted(found & {"torch", "numpy", "safetensors", "starlette", "prometheus_client"}) == []
