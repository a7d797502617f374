"""`mainstem demo`, as `make demo` runs it, and what it fetches."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from daemon.demo.live import Live
from tests.daemon.homes import make_home
from tests.daemon.processes import mainstem, running
from tests.daemon.pulls import merge_one, served
from tests.demo_table import check
from tests.models import write_base


@pytest.mark.slow  # .ci/run has `make demo` run and its table checked, and test_demo_digits.py has its parts
def test_the_demo_merges_every_expert_and_reads_every_place(tmp_path: Path) -> None:
    done = mainstem("demo", "--home", tmp_path / "home")
    assert done.returncode == 0, done.stderr
    check(done.stdout)
    assert "<h1>mainstem report" in (tmp_path / "home" / "report.html").read_text()
    assert f"mainstem run --home {tmp_path / 'home'} &\n  http://127.0.0.1:8765/" in done.stdout
    with running("run", "--home", tmp_path / "home", "--port", "0") as daemon:
        assert daemon.live() == 8


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "versions"),
        ([(n, 90.0) for n in range(1, 8)], "versions"),
        ([(n, 90.0) for n in range(1, 8)] + [(8, 79.9)], "79.9 %"),
        ([(n, 90.0) for n in range(1, 9)], "right_shuffled"),
    ],
)
def test_a_table_that_lacks_a_version_or_reads_badly_is_found(rows: list[tuple[int, float]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check("".join(f"│ merged main/{version} │ 96.1 │ {mean} │\n" for version, mean in rows))


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 10_000])
def test_it_fetches_the_weights_and_nothing_else(shard_bytes: int, tmp_path: Path) -> None:
    """From one file or from shards, with the card, the configuration and the index beside them."""
    home = make_home(tmp_path / "home", write_base(tmp_path / "base", seed=1, hidden=64), (("main", "mean", {}),))
    merge_one(home, 1, publish={"shard_bytes": shard_bytes})
    files = list(home.latest("main").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes < 5_000_000_000)
    with served(home) as origin:
        fetched = Live(origin, home.inbox, tmp_path / "log").fetch()
    there = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert fetched.keys() == there.keys() and all(torch.equal(fetched[name], there[name]) for name in there)
