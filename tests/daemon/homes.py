"""Real homes for the tests, and the daemon run over them in this process."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import Any

import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from daemon.config import Settings
from daemon.home.founding import found
from daemon.layout import Home
from daemon.service import Service
from projector.methods import make
from registry.reader import Reader
from registry.records import Expert
from tests.models import read_weights

Heads = Sequence[tuple[str, str, Mapping[str, Any]]]
MAIN: Heads = (("main", "opcm", {}),)


def make_home(root: Path, base: Path, heads: Heads = MAIN) -> Home:
    """Founds a home as `mainstem init` does."""
    home = Home(root)
    found(home, base, [(name, make(method, params)) for name, method, params in heads], lambda step: None)
    return home


def quick(**tables: Mapping[str, Any]) -> Settings:
    """Settings under which every drop counts as complete at once and every refusal is final; `tables` come on top."""
    inbox = {"settle_seconds": 0, "patience_seconds": 0, "resume_seconds": 0, "watch": "poll", "scan_seconds": 0.05}
    return Settings.model_validate({**tables, "inbox": {**inbox, **tables.get("inbox", {})}})


def drain(home: Home, settings: Settings | None = None) -> CollectorRegistry:
    """`mainstem run --once --no-http`; returns the metrics of that run."""
    service = Service(home, settings or quick())
    service.run(once=True, http=False)
    return service._metrics.registry


def put(home: Home, path: Path, name: str | None = None) -> Path:
    """Moves a file or a folder into the inbox, as an upload that is renamed into place."""
    target = home.inbox / (name or path.name)
    shutil.move(path, target)
    return target


@contextmanager
def lineage(home: Home) -> Iterator[Reader]:
    """The registry, read-only."""
    with Reader.open(home.registry) as reader:
        yield reader


def experts(home: Home) -> list[Expert]:
    """Every expert that ever arrived, oldest first."""
    with lineage(home) as reader:
        return reader.experts(limit=-1)[::-1]


def live(home: Home, head: str = "main") -> int:
    """The live version's number."""
    with lineage(home) as reader:
        found = reader.head(head)
    assert found is not None
    return found.live


def latest(home: Home, head: str = "main") -> dict[str, Tensor]:
    """The weights that a consumer loads now."""
    return read_weights(home.latest(head))


def reason_of(home: Home, expert: Expert) -> dict[str, Any]:
    """What reason.json says of a refused expert."""
    content: dict[str, Any] = json.loads((home.quarantine(expert.id) / "reason.json").read_bytes())
    return content


def count(metrics: CollectorRegistry, name: str, **labels: str) -> float:
    """One sample of a run's metrics."""
    value = metrics.get_sample_value(name, labels)
    assert value is not None, f"there is no {name}{labels}"
    return value


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 2e-6) -> None:
    """Holds published weights against an oracle's float64 ones; `tolerance` is relative to the largest value."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        if not tensor.is_floating_point():
            assert torch.equal(found[name], tensor), name
            continue
        error = (found[name].double() - tensor.double()).abs().max()
        assert error <= tolerance * tensor.double().abs().max(), f"{name} is off by {error}"


def tree(root: Path) -> dict[str, bytes | str]:
    """Everything below `root`: a file's bytes, a link's target, or what else is there. What is removed meanwhile is not
    there."""
    found: dict[str, bytes | str] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(folder) / name
            key = str(path.relative_to(root))
            with suppress(FileNotFoundError):
                kind = path.lstat().st_mode
                if S_ISLNK(kind):
                    found[key] = f"-> {path.readlink()}"
                elif S_ISREG(kind):
                    found[key] = path.read_bytes()
                else:
                    found[key] = "folder" if S_ISDIR(kind) else "special"
    return found
