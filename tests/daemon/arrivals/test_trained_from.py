"""The version that an expert says it was trained from: one of this home, or the expert is refused."""

import json
from pathlib import Path

import pytest

from daemon.arrivals.trained_from import named_version
from daemon.checkpoints.expert_json import ABOUT, About
from daemon.errors import Reason, Refused
from daemon.layout import Home
from registry.records import Status
from tests.daemon.homes import drain, experts, lineage, make_home, put
from tests.daemon.processes import forked_each
from tests.models import write_expert


def trained(folder: Path, trained_from: str) -> Path:
    (folder / ABOUT).write_text(json.dumps({"trained_from": trained_from}))
    return folder


def test_an_expert_names_a_version_that_is_there_or_is_refused(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, trained(write_expert(tmp_path / "one", base, 1), "main/0"))
    drain(home)
    put(home, trained(write_expert(tmp_path / "two", base, 2), "main/7"))
    drain(home)
    one, two = experts(home)
    assert one.status is Status.MERGED and one.about == {"trained_from": "main/0"}
    assert (two.status, two.reason) == (Status.QUARANTINED, Reason.TRAINED_FROM)
    assert two.detail and "there is no version main/7" in two.detail
    assert two.hint and "main/1" in two.hint
    kept = home.quarantine(two.id) / "two"
    listed, table, looked = forked_each(
        [
            ("log", "--json", "--home", home.root),
            ("log", "--home", home.root),
            ("inspect", kept, "--json", "--home", home.root),
        ]
    )
    assert json.loads(listed.stdout)[-1]["about"]["trained_from"] == "main/0"
    assert "main/0" in table.stdout and "from" in table.stdout.splitlines()[0]
    assert looked.returncode == 1 and json.loads(looked.stdout)["reason"] == "trained_from"
    put(home, trained(kept, "main/1"))  # what the hint says
    drain(home)
    assert experts(home)[-1].status is Status.MERGED


def test_what_it_may_name(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base, [("main", "latest", {}), ("init", "ema", {})])
    put(home, write_expert(tmp_path / "one", base, 1))
    drain(home)
    with lineage(home) as reader:

        def named(words: str | None) -> tuple[str, int] | None:
            version = named_version(reader, About(trained_from=words))
            return version and (version.head, version.number)

        assert named_version(reader, None) is named(None) is None
        assert named("init/1") == ("init", 1) and named("main/000001") == ("main", 1)
        assert named(reader.base().sha256) == ("main", 0)
        for words, why in (
            ("main/2", "no version main/2"),
            ("main/" + "9" * 18, "no version main/9"),
            ("soup/0", "no head soup"),
            ("0" * 64, "no version is called 0"),
        ):
            with pytest.raises(Refused, match=why):
                named(words)
