"""The sizing formula, held against what real arrivals wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from daemon.layout import Home
from daemon.reports.sizing import of_home, products_of
from projector.algebra.linalg import energy
from projector.method import Contribution, State, Totals
from projector.methods import make
from projector.spec import TensorSpec
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


@pytest.mark.parametrize("shape", [(96, 96), (256, 64), (64, 256), (2, 64, 96)], ids=str)
@pytest.mark.parametrize(("name", "params"), [("opcm", {}), ("iso_c", {}), ("wudi", {"solver": "adam", "steps": 4})])
def test_products_are_foretold(name: str, params: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Within a factor of four: held against those of a real arrival, which are counted."""
    method, spec = make(name, params), TensorSpec("w", shape, torch.float32)
    state: State = {key: torch.zeros(slot.shape, dtype=slot.dtype) for key, slot in method.slots(spec).items()}
    draw = torch.Generator().manual_seed(0)
    for i in (1, 2):
        delta, expert = torch.randn(shape, generator=draw), Contribution(i)
        with FlopCounterMode(display=False) as counted:
            state, sums = method.update({**state, **method.prepare(state, spec)}, delta, spec, expert)
            totals = method.tally(Totals(i - 1), {**sums, "task_vector": energy(delta)}, expert)
            method.read(torch.zeros(shape), state, totals, spec)
    assert 0.25 < counted.get_total_flops() / 2 / products_of(spec, method) < 4


def test_the_longer_side_counts_where_a_method_keeps_squares_of_it() -> None:
    def products(name: str, shape: tuple[int, ...], **params: Any) -> int:
        return products_of(TensorSpec("w", shape, torch.float32), make(name, params))

    tall, wide = (512, 128), (128, 512)
    assert products("opcm", tall) == products("opcm", wide)
    assert products("confluence", tall) == products("confluence", wide) > 4 * products("opcm", tall)
    for name in ("wudi", "ace"):
        assert products(name, wide) > 4 * products(name, tall)
    assert products("confluence", (3, *wide)) == 3 * products("confluence", wide)


def test_inspect_says_it(home: Home, base: Path, tmp_path: Path) -> None:
    put_aside = write_expert(tmp_path / "9.safetensors", base, 9)
    said = json.loads(forked("inspect", put_aside, "--home", home.root, "--json").stdout)
    with lineage(home) as reader:
        found = of_home(home, reader, quick())
    assert said["writes_bytes"] == found.arrival_bytes and said["estimated_seconds"] > 0
    assert said["reads_bytes"] == found.read_bytes - base.stat().st_size + put_aside.stat().st_size
