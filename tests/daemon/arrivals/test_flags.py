"""Experts that are merged although something about them is odd: everywhere that says so."""

import json
import re
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog
from sqlalchemy.dialects import sqlite

from daemon.arrivals.inbox import Drop
from daemon.arrivals.recording import arrived
from daemon.cli.log import Flagged
from daemon.http.rows import expert_row
from daemon.layout import Home
from daemon.reports.inspect import inspect
from registry.engine import connect
from registry.records import Flag, Status
from registry.statements import newest_experts
from registry.store import Store
from tests.daemon.homes import count, drain, experts, lineage, put, quick
from tests.daemon.processes import forked, rebuild
from tests.models import write_expert
from tests.registry.samples import expert, make, versions

USUAL, LONG, SHORT = 0.01, 0.046, 0.002


@pytest.fixture
def home(home: Home, tmp_path: Path, base: Path) -> Home:
    """A home with three ordinary experts, which make a usual norm."""
    for seed in (2, 3, 4):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed, USUAL))
    drain(home)
    assert all(not one.flags and one.detail is None for one in experts(home))
    return home


def test_an_odd_norm_is_merged_and_said_everywhere(home: Home, base: Path, tmp_path: Path) -> None:
    long = put(home, write_expert(tmp_path / "long.safetensors", base, 5, LONG))
    with lineage(home) as reader:
        dry = inspect(home, reader, long, None)
    assert dry["flags"] == ["long"] and "4.5 times" in dry["warning"] and dry["hint"]
    with structlog.testing.capture_logs() as said:
        metrics = drain(home)
    odd = experts(home)[-1]
    assert (odd.status, odd.flags, odd.version) == (Status.MERGED, (Flag.LONG,), 4)
    assert odd.detail and odd.hint and odd.detail == dry["warning"]
    (line,) = [line for line in said if line["log_level"] == "warning"]
    assert line["id"] == odd.id and line["flags"] == ("long",) and line["detail"] == odd.detail
    assert count(metrics, "mainstem_experts_flagged_total", flag="long") == 1
    assert count(metrics, "mainstem_experts_flagged_total", flag="short") == 0

    put(home, write_expert(tmp_path / "short.safetensors", base, 6, SHORT))
    put(home, write_expert(tmp_path / "fine.safetensors", base, 7, USUAL))
    drain(home)
    assert {one.name: one.flags for one in experts(home)[-2:]} == {
        "short.safetensors": (Flag.SHORT,),
        "fine.safetensors": (),
    }
    assert listed(home, "any") == ["short.safetensors", "long.safetensors"]
    assert listed(home, "long") == ["long.safetensors"]
    table = forked("log", "--home", home.root)
    assert table.returncode == 0 and " long " in table.stdout and " short " in table.stdout
    assert "\nflags\n  long\n" in forked("show", odd.id, "--home", home.root).stdout
    assert re.search(r"\nflags +-\n", forked("show", 1, "--home", home.root).stdout)
    assert expert_row(odd, home)["flags"] == ["long"]


def listed(home: Home, flag: str) -> list[str]:
    done = forked("log", "--home", home.root, "--flag", flag, "--json")
    assert done.returncode == 0, done.stderr
    return [row["name"] for row in json.loads(done.stdout)]


def test_the_limit_is_the_settings(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "long.safetensors", base, 5, LONG))
    drain(home, quick(admission={"warn_norm_ratio": 10.0}))
    assert experts(home)[-1].flags == ()


def test_an_odd_expert_again_is_a_duplicate_without_a_flag(home: Home, base: Path, tmp_path: Path) -> None:
    for name in ("long", "again"):
        put(home, write_expert(tmp_path / f"{name}.safetensors", base, 5, LONG))
        drain(home)
    again = experts(home)[-1]
    assert (again.status, again.flags) == (Status.DUPLICATE, ())


def test_a_rebuild_flags_what_was_flagged(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "long.safetensors", base, 5, LONG))
    drain(home)
    rebuild(home, "--into", tmp_path / "again", "--method", "mean")
    assert [one.flags for one in experts(Home(tmp_path / "again"))] == [(), (), (), (Flag.LONG,)]


def test_the_hint_takes_it_out_again(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "long.safetensors", base, 5, LONG))
    drain(home)
    odd = experts(home)[-1]
    assert odd.hint and "`mainstem rebuild --without`" in odd.hint
    rebuild(home, "--without", str(odd.id))
    assert experts(home)[-1].status is Status.WITHDRAWN


def test_every_flag_can_be_asked_for_and_is_documented() -> None:
    assert {*map(str, Flag), "any"} == set(map(str, Flagged))
    page = (Path(__file__).parents[3] / "docs" / "refusals.md").read_text()
    assert set(re.findall(r"^- `(\w+)`:", page, re.MULTILINE)) == set(map(str, Flag))


def test_flags_come_back_from_the_registry(tmp_path: Path) -> None:
    path = make(tmp_path / "registry.sqlite", merged=2)
    with Store.open(path) as store:
        both = store.commit(expert(3, flags=(Flag.LONG, Flag.SHORT)), versions(3))
        assert both.flags == (Flag.LONG, Flag.SHORT)

        def found(*flags: Flag) -> list[int]:
            return [one.id for one in store.experts(flags=flags)]

        assert found(Flag.LONG) == found(Flag.SHORT) == found(*Flag) == [3]
        assert found() == [3, 2, 1]


def test_experts_with_a_flag_are_found_by_an_index(tmp_path: Path) -> None:
    """Of a hundred thousand experts a few have one."""
    path = make(tmp_path / "registry.sqlite")
    query = newest_experts(None, 20, None, None, [Flag.LONG])
    text = str(query.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True}))
    with closing(connect(path, "ro")) as raw:
        plan = " ".join(str(row) for row in raw.execute(f"EXPLAIN QUERY PLAN {text}"))
    assert "experts_flagged" in plan, plan


def test_received_is_when_it_came_however_long_others_took() -> None:
    """Drops of one listing are taken one after another: the last has waited for all before it."""
    listed = Drop("x", "1:2:3", 0, 1, rest_seconds=2.0)
    late = replace(listed, listed_at=listed.listed_at - 100)
    waited = (datetime.now(UTC) - arrived(late, Status.MERGED).received_at).total_seconds()
    assert 102 <= waited < 112
