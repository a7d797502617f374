"""expert.json: what is accepted, what is refused and how it is said, and where what it says shows up."""

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient
from structlog.testing import capture_logs

from daemon.checkpoints.checkpoint import open_checkpoint, open_path
from daemon.checkpoints.expert_json import ABOUT, MAX_ABOUT_BYTES, About, read_about
from daemon.errors import NotYet, Reason, Refused
from daemon.http import create_app
from daemon.layout import Home
from projector.names.naming import Naming
from registry.records import Status
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, make_home, reason_of
from tests.daemon.processes import forked
from tests.models import read_weights, write_base, write_expert
from tests.oracles.rules import ema

EVERYTHING = {
    "name": "fünf 🐋",
    "task": "counting in fives",
    "weight": 3,
    "trained_from": "main/0",
    "data": ["hf://datasets/me/fives", {"uri": "s3://bucket/more.jsonl", "sha256": "0f" * 32}],
    "notes": "three epochs\n\tand a half",
}


def read(text: str | bytes, folder: Path) -> About:
    """As the daemon reads it."""
    path = folder / ABOUT
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_about(fd)
    finally:
        os.close(fd)


def said(folder: Path, **about: object) -> Path:
    (folder / ABOUT).write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    "content",
    [
        {},
        EVERYTHING,
        {"weight": 1e3},
        {"weight": 1e-3},
        {"trained_from": "0" * 64},
        {"trained_from": "soup_2/0"},
        {"trained_from": "main/12"},
        {"data": [f"file:///data/{n}" for n in range(256)]},
        {"data": [{"sha256": "0f" * 32}, "urn:a:b"]},
        {"name": "x" * 200, "notes": "y" * 4000},
        {"prefixes": {"net.*.": "bert.*.", "": "x."}, "ignore": ["ema.*", "*"], "unchanged": ["lm_head.?"]},
        {"prefixes": {}, "ignore": ["x" * 200] * 64},
    ],
)
def test_what_is_given_is_kept(content: dict[str, Any], tmp_path: Path) -> None:
    about = read(json.dumps(content), tmp_path)
    assert about.given() == content
    assert about.weight == content.get("weight", 1)
    assert json.loads(json.dumps(about.given())) == content


def test_a_field_may_be_null_as_if_it_were_not_there(tmp_path: Path) -> None:
    assert read('{"name": null, "notes": null, "weight": 2}', tmp_path).given() == {"weight": 2}


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_other_unicode_is_read_too(encoding: str, tmp_path: Path) -> None:
    assert read(json.dumps(EVERYTHING, ensure_ascii=False).encode(encoding), tmp_path).given() == EVERYTHING


def test_globs_that_could_take_for_ever_are_refused(tmp_path: Path) -> None:
    about = read(json.dumps({"ignore": ["*" + "a" * 190 + "b"] * 64}), tmp_path)
    assert about.naming(Naming(), ["a" * 1000]).ignore == (*about.ignore,)
    with pytest.raises(Refused, match="could take for ever") as refused:
        about.naming(Naming(), ["a" * 1000] * 1000)
    assert refused.value.reason is Reason.BAD_ABOUT


WEIGHT = "weight must be a number from 0.001 to 1000"
LINE = "must be one printable line of at most 200 characters"


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        *(
            (f'{{"weight": {value}}}', WEIGHT)
            for value in (
                "0",
                "-1",
                "-0.0",
                "9.99e-7",
                "5e-324",
                "1000.1",
                "NaN",
                "Infinity",
                "-Infinity",
                "1e999",
                "1" + "0" * 400,
            )
        ),
        *((f'{{"weight": {value}}}', WEIGHT) for value in ('"2"', "true", "null", "[1]", '{"a": 1}', "1e-400")),
        ('{"name": 3}', f"name {LINE}"),
        (json.dumps({"name": "x" * 201}), f"name {LINE}"),
        (json.dumps({"name": "two\nlines"}), f"name {LINE}"),
        (json.dumps({"task": "\x1b[2Jgone"}), f"task {LINE}"),
        (json.dumps({"task": "\u202edlog"}), f"task {LINE}"),
        (json.dumps({"task": "\ud800"}), f"task {LINE}"),
        (json.dumps({"task": "nul\0"}), f"task {LINE}"),
        (json.dumps({"notes": "y" * 4001}), "notes must be printable text of at most 4000 characters"),
        (json.dumps({"notes": "\x1b]0;title\x07"}), "notes must be printable text"),
        ('{"notes": ["a"]}', "notes must be printable text"),
        *(
            (json.dumps({"trained_from": value}), "trained_from must be a version such as main/12, or a sha256")
            for value in ("main", "main/-1", "main/12\n", "../main/1", "A" * 64, "0" * 63, "", 12, "x" * 500 + "/1")
        ),
        *(
            (json.dumps({"data": value}), "data must be a list of at most 256, each a URI of at most 1000 printable")
            for value in (
                "hf://datasets/me",
                ["data/train.jsonl"],
                ["s3://with blank"],
                ["s3://" + "x" * 1000],
                ["s3://\x1b[2J"],
                [{}],
                [{"sha256": "0F" * 32}],
                [{"uri": "s3://a", "rows": 3}],
                [3],
                ["s3://a"] * 257,
            )
        ),
        ('{"wieght": 2}', "wieght is none of its fields"),
        *(
            (json.dumps({"prefixes": value}), "prefixes must be an object: what names begin with")
            for value in (["a."], {"a.": 1}, {"a*.": "b."}, {"*.": "b."}, {"x" * 201: ""}, {"a\n": ""}, None)
        ),
        (json.dumps({"prefixes": {str(n): "" for n in range(65)}}), "prefixes must be an object"),
        (json.dumps({"ignore": "head.*"}), "ignore must be a list of globs"),
        (json.dumps({"ignore": ["x"] * 65}), "ignore must be a list of globs"),
        (json.dumps({"unchanged": ["x" * 201]}), "unchanged must be a list of globs"),
        (json.dumps({"a\x1b[2J" + "b" * 500: 2}), r"a\\x1b\[2Jbbb"),
        ('{"weight": 1, "weight": 2}', "a field is there twice"),
        ('{"notes": {"a": 1, "a": 2}}', "a field is there twice"),
        *((text, "it is not an object with fields") for text in ("[]", "3", "null", '"text"', "true")),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text: str, detail: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=detail) as refused:
        read(text, tmp_path)
    assert refused.value.reason is Reason.BAD_ABOUT
    assert str(refused.value).startswith("expert.json: ") and str(refused.value).isprintable()
    assert len(str(refused.value)) < 250
    assert "name, task, weight, trained_from, notes" in refused.value.hint


@pytest.mark.parametrize(
    "text", ["", "{", '{"name": "half', "[" * 60_000, b"\xff\xfe\xff", '{"weight": ' + "1" * 5000 + "}"]
)
def test_what_is_no_json_may_only_be_unfinished(text: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(NotYet, match=r"expert\.json is not JSON") as waiting:
        read(text, tmp_path)
    assert waiting.value.reason is Reason.BAD_ABOUT


def test_its_size_is_bounded(tmp_path: Path) -> None:
    assert read("{}" + " " * (MAX_ABOUT_BYTES - 2), tmp_path).given() == {}
    with pytest.raises(Refused, match="it has 65537 bytes, 65536 are allowed"):
        read("{}" + " " * (MAX_ABOUT_BYTES - 1), tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "x", seed=1)


def refusal(folder: Path) -> Refused:
    """Why the daemon refuses this folder of its inbox."""
    with ExitStack() as closing:
        fd = os.open(folder.parent, os.O_RDONLY)
        closing.callback(os.close, fd)
        with pytest.raises(Refused) as refused, open_checkpoint(fd, folder.name):
            pass
        return refused.value


def test_it_is_opened_like_everything_that_strangers_drop(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (folder / ABOUT).symlink_to(tmp_path / "secret.json")
    assert refusal(folder).reason is Reason.SYMLINK
    (folder / ABOUT).unlink()
    os.mkfifo(folder / ABOUT)
    assert refusal(folder).reason is Reason.NOT_A_FILE
    (folder / ABOUT).unlink()
    (folder / ABOUT).mkdir()
    assert refusal(folder).reason is Reason.BAD_ABOUT


def test_it_is_held_but_is_not_part_of_the_identity(folder: Path) -> None:
    with open_path(folder) as alone:
        assert alone.about is None and alone.weight == 1
        identity, size = alone.identity(), alone.size_bytes
    said(folder, weight=2.5)
    with open_path(folder) as checkpoint:
        assert checkpoint.about is not None and checkpoint.weight == 2.5
        assert (checkpoint.identity(), checkpoint.size_bytes) == (identity, size)
        assert checkpoint.unchanged()
        said(folder, weight=3.5)
        assert not checkpoint.unchanged()


def weighted_mean(base: Path, given: list[tuple[Path, float]]) -> dict[str, torch.Tensor]:
    origin = read_weights(base)
    total = sum(weight for _, weight in given)
    moved = [(read_weights(path), weight) for path, weight in given]
    return {
        name: tensor.double() + sum(w * (expert[name].double() - tensor.double()) for expert, w in moved) / total
        if tensor.is_floating_point()
        else tensor
        for name, tensor in origin.items()
    }


def test_its_weight_counts_and_what_it_says_is_kept(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {}), ("run", "ema", {"weight": 0.25})])
    one, two = write_expert(tmp_path / "one", base, 2), write_expert(tmp_path / "two", base, 3)
    said(one, **EVERYTHING)
    with capture_logs() as lines:
        for path in (one, two):
            shutil.copytree(path, home.inbox / path.name)
            drain(home)
    assert_close(latest(home), weighted_mean(base, [(one, 3.0), (two, 1.0)]))
    assert_close(latest(home, "run"), ema(read_weights(base), [read_weights(one), read_weights(two)], 0.25))
    (line,) = (line for line in lines if "counts as any other" in line["event"])
    assert (line["drop"], line["heads"], line["weight"], line["log_level"]) == ("one", ["run"], 3, "info")

    first, second = experts(home)
    assert (first.about, first.weight) == (EVERYTHING, 3) and (second.about, second.weight) == (None, 1)
    assert (home.archive(first.id) / "one" / ABOUT).read_bytes() == (one / ABOUT).read_bytes()
    manifests = [json.loads(home.manifest("main", n).read_bytes())["expert"] for n in (1, 2)]
    assert [(expert["task"], expert["weight"]) for expert in manifests] == [("counting in fives", 3), (None, 1)]
    check_listings(home, first.sha256 or "")

    # the same weights are the same expert, whatever it says of itself
    shutil.copytree(two, home.inbox / "again")
    said(home.inbox / "again", weight=7)
    drain(home)
    twin = experts(home)[-1]
    assert (twin.status, twin.duplicate_of, twin.about) == (Status.DUPLICATE, second.id, {"weight": 7})


def check_listings(home: Home, sha256: str) -> None:
    """log, show, inspect and HTTP."""
    at = ("--home", home.root)
    rows = json.loads(forked("log", "--json", *at).stdout)
    assert [row["about"] for row in rows] == [None, EVERYTHING]
    table = forked("log", *at).stdout
    assert "counting in fives" in table and "weight" in table
    assert json.loads(forked("show", "1", "--json", *at).stdout)["about"] == EVERYTHING
    shown = forked("show", "1", *at).stdout
    for words in ("name             fünf", "counting in fives", "trained_from     main/0", "three epochs"):
        assert words in shown
    assert "about            -" in forked("show", "2", *at).stdout
    found = json.loads(forked("inspect", home.archive(1) / "one", "--json", *at).stdout)
    assert found["accepted"] and found["weight"] == 3
    with lineage(home) as reader:
        client = TestClient(create_app(home, reader, CollectorRegistry(), lambda: None))
        assert client.get(f"/v1/experts/{sha256}").json()["about"] == EVERYTHING
        assert [row["about"] for row in client.get("/v1/lineage").json()["experts"]] == [EVERYTHING, None]


def test_a_bad_one_goes_to_quarantine_with_its_expert(home: Home, base: Path, tmp_path: Path) -> None:
    bad = write_expert(tmp_path / "bad", base, 2)
    said(bad, weight=-1)
    shutil.copytree(bad, home.inbox / "bad")
    drain(home)
    (expert,) = experts(home)
    assert (expert.status, expert.reason, expert.about) == (Status.QUARANTINED, "bad_about", None)
    assert reason_of(home, expert)["detail"] == f"expert.json: {WEIGHT}"
    assert (home.quarantine(expert.id) / "bad" / ABOUT).read_text() == '{"weight": -1}'
    found = forked("inspect", home.quarantine(expert.id) / "bad", "--json", "--home", home.root)
    assert found.returncode == 1 and json.loads(found.stdout)["reason"] == "bad_about"
