"""A head that keeps a record of every expert: wherever the daemon dies, each expert has its one record and no other."""

import os
import signal
from pathlib import Path

import pytest

from tests.crash.daemons import Zygote
from tests.crash.worlds import FULL, MakeFolder, World, drain, outcome, settle, watch

EMR = ("--method", "emr", "--head", "init=ema")
POINTS = ("publish.before", "publish.after", "commit.before", "commit.after", "read_out.after")


@pytest.fixture(scope="module")
def records(make_folder: MakeFolder, zygote: Zygote) -> World:
    return World(make_folder("records"), zygote, EMR)


@pytest.fixture(scope="module")
def undisturbed_records(make_folder: MakeFolder, records: World) -> tuple[dict[str, object], list[str]]:
    """What an undisturbed run gives, and the failpoints that it passed."""
    root = make_folder("undisturbed")
    home = records.home(root / "home")
    ended = records.zygote.run(*drain(home), trace=root / "trace")
    assert ended.code == 0, ended.log
    records.finish(home, {})
    assert sorted(os.listdir(home.views("main"))) == [f"00000{n}.safetensors" for n in (1, 2, 3)]
    assert not home.views("init").exists()
    return outcome(home), (root / "trace").read_text().split()


def renames(trace: list[str]) -> list[int]:
    """The passes of `rename`, from 1, between the first publish.before and publish.after: the first is the record's."""
    before, after = trace.index("publish.before"), trace.index("publish.after")
    first = trace[:before].count("rename") + 1
    return list(range(first, first + trace[before:after].count("rename")))


@pytest.mark.parametrize("point", POINTS)
def test_killed(
    point: str, records: World, undisturbed_records: tuple[dict[str, object], list[str]], tmp_path: Path
) -> None:
    home = records.home(tmp_path / "home")
    assert records.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"{point}=kill").code == -signal.SIGKILL
    records.finish(home, {})
    assert outcome(home) == undisturbed_records[0]


def test_killed_between_the_renames_of_a_version(
    records: World, undisturbed_records: tuple[dict[str, object], list[str]], tmp_path: Path
) -> None:
    expected, trace = undisturbed_records
    places = renames(trace)
    assert len(places) == 5  # the record, and two folders for each head
    for nth in places[:3]:
        home = records.home(tmp_path / f"{nth}")
        assert records.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"rename=kill:{nth}").code == -signal.SIGKILL
        assert home.view_record("main", 1).exists() == (nth > places[0])  # a stray, for recovery to remove
        records.finish(home, {})
        assert outcome(home) == expected


def test_a_full_disk_between_publishing_and_commit_is_waited_for(
    records: World, undisturbed_records: tuple[dict[str, object], list[str]], tmp_path: Path
) -> None:
    home = records.home(tmp_path / "home")
    daemon = records.zygote.start(*watch(home), MAINSTEM_FAILPOINT="commit.before=enospc")
    ended = settle(home, daemon, len(records.drops))
    assert ended.code == 0 and FULL in ended.log, ended.log
    records.finish(home, {})
    assert outcome(home) == undisturbed_records[0]
