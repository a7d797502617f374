"""The sizing formula, held against what real arrivals wrote."""

import json
from pathlib import Path

import pytest

from daemon.layout import Home
from daemon.reports.sizing import of_home
from tests.daemon.homes import drain, lineage, make_home, put, quick
from tests.daemon.processes import forked
from tests.models import write_base, write_expert

CARD_BYTES = 64 << 10  # a version's card and manifest, of a model as small as this one


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


@pytest.mark.parametrize("dtype", ["base", "bfloat16"])
def test_what_an_arrival_writes_is_foretold(tmp_path: Path, dtype: str) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=1)
    heads = (("main", "opcm", {}), ("views", "emr", {}), ("soup", "mean", {}))
    home = make_home(tmp_path / "home", base, heads)
    settings = quick(publish={"dtype": dtype}, retention={"versions": 1, "grace_seconds": 0})
    with lineage(home) as reader:
        found = of_home(home, reader, settings)
    put(home, write_expert(tmp_path / "2.safetensors", base, 2))
    put(home, write_expert(tmp_path / "3.safetensors", base, 3))
    drain(home, settings)

    def weights(number: int) -> int:
        return sum((home.version(name, number) / "model.safetensors").stat().st_size for name, _, _ in heads)

    states = {(name, n): size(home.head_state(name, n)) for name, _, _ in heads for n in (1, 2)}
    record = home.view_record("views", 2).stat().st_size
    assert weights(2) == found.version_bytes
    assert sum(states[name, 2] for name, _, _ in heads) + record == found.state_bytes
    assert found.arrival_bytes == found.version_bytes + found.state_bytes
    written = sum(size(home.version(name, 2)) for name, _, _ in heads)
    assert found.version_bytes < written < found.version_bytes + 3 * CARD_BYTES
    at_rest = size(home.root) - size(home.root / "archive") - home.registry.stat().st_size
    rest = found.home_bytes - found.prepared_bytes  # nothing was prepared
    views = states["views", 1] + home.view_record("views", 1).stat().st_size
    assert rest - CARD_BYTES < at_rest - views < rest + 9 * CARD_BYTES
    assert 0 < found.seconds < 60 and found.memory_bytes > 290 << 20


def test_inspect_says_it(home: Home, base: Path, tmp_path: Path) -> None:
    put_aside = write_expert(tmp_path / "9.safetensors", base, 9)
    said = json.loads(forked("inspect", put_aside, "--home", home.root, "--json").stdout)
    with lineage(home) as reader:
        found = of_home(home, reader, quick())
    assert said["writes_bytes"] == found.arrival_bytes and said["estimated_seconds"] > 0
    assert said["reads_bytes"] == found.read_bytes - base.stat().st_size + put_aside.stat().st_size
