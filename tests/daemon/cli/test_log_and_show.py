"""`mainstem log`, `show` and `status` where the newest version is not live: what is held, and with which scores."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from daemon.interventions.deeds import Request, carry_out
from daemon.layout import Home
from registry.records import Deed, NewIntervention, NewVersion
from registry.store import Store
from tests.daemon.homes import drain, lineage, make_home, put, quick
from tests.daemon.processes import forked, forked_each
from tests.models import write_base, write_expert

SCORE = """
import json, sys
told = json.load(sys.stdin)
held_out = {"score": 0.9, "held_out": True, "n": 200, "stderr": 0.01}
print(json.dumps({"a": {0: 0.5, 1: 0.6, 2: 0.3}.get(told["version"], 0.6), "z": held_out}))
"""
GATE = {
    "command": ["python3", "score.py", "{folder}"],
    "require": ["each >= live - 0.05", "mean >= expert - 1 else reject"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """main/0 and main/1 are scored, main/2 is held; what is no checkpoint lies in quarantine."""
    root = tmp_path_factory.mktemp("held")
    base = write_base(root / "base.safetensors", seed=1)
    home = make_home(root / "home", base)
    (home.root / "score.py").write_text(SCORE)
    for seed in (2, 3):
        put(home, write_expert(root / f"{seed}.safetensors", base, seed))
        drain(home, quick(evaluate=GATE))
    (home.inbox / "bad.safetensors").write_bytes(b"")
    drain(home)
    return home


@pytest.fixture
def home(made: Home, tmp_path: Path) -> Home:
    return Home(shutil.copytree(made.root, tmp_path / "home", symlinks=True))


def intervened(home: Home, deed: Deed, **what: Any) -> None:
    with Store.open(home.registry) as store:
        assert carry_out(home, store, Request(deed, "ada", **what))


def told(home: Home, *commands: str) -> list[Any]:
    """What each command prints as JSON."""
    done = forked_each([[*words.split(), "--home", home.root, "--json"] for words in commands])
    assert [one.stderr for one in done] == [""] * len(done)
    return [json.loads(one.stdout) for one in done]


def test_the_versions_say_which_is_live_and_why_others_are_not(home: Home) -> None:
    (rows,) = told(home, "log --versions")
    assert [(row["number"], row["live"], row["mean"], row["parent"]) for row in rows] == [
        (2, False, 0.3, 1),
        (1, True, 0.6, 0),
        (0, False, 0.5, None),
    ]
    assert rows[0]["held"].startswith("`each >= live - 0.05`: `a` 0.3 against 0.6")
    assert rows[1]["scores"]["z"] == {
        "score": 0.9,
        "higher_is_better": True,
        "n": 200,
        "stderr": 0.01,
        "held_out": True,
    }
    intervened(home, Deed.PIN, head="main", version=0)
    intervened(home, Deed.ROLLBACK, head="main", version=0, why="a\nb")
    table, short, done, unknown, both = forked_each(
        [
            ["log", "--versions", "--home", home.root],
            ["log", "--versions", "--limit", "1", "--head", "main", "--home", home.root],
            ["log", "--interventions", "--home", home.root],
            ["log", "--versions", "--head", "other", "--home", home.root],
            ["log", "--versions", "--flag", "any", "--home", home.root],
        ]
    )
    newest, second, oldest = table.stdout.splitlines()[1:4]
    assert (
        "held: `each" in newest and "rolled back" in second and "pinned" in oldest and oldest.rstrip().endswith("live")
    )
    assert short.stdout.endswith("these are the newest 1 of main: --limit N lists more\n")
    assert "rollback" in done.stdout and "main/0" in done.stdout and "a\\nb" in done.stdout
    assert "there is no head 'other'" in unknown.stderr and unknown.returncode == 1
    assert "stand alone" in both.stderr and both.returncode == 2
    (rows,) = told(home, "log --interventions --limit 1")
    assert [(row["deed"], row["who"], row["version"], row["previous"]) for row in rows] == [("rollback", "ada", 0, 1)]


def test_show_has_the_scores_and_the_verdict(home: Home) -> None:
    version, expert, untouched = told(home, "show main/2", "show 1", "show bad.safetensors")
    assert (version["live"], version["scores"]["a"]["score"], version["verdict"]["outcome"]) == (False, 0.3, "held")
    assert version["held"].endswith(version["verdict"]["broken"][0]["why"])
    assert (expert["blocked"], expert["closed_at"]) == (False, None)
    assert untouched["scores"] is None and untouched["evaluation"] is None and untouched["verdicts"] == {}
    assert expert["verdicts"]["main/1"]["outcome"] == "live" and list(expert["verdicts"]) == ["main/1"]
    with lineage(home) as reader:
        found = reader.version("main", 2)
        assert found and found.evaluation
    with Store.open(home.registry) as store:
        store.judge_expert(2, found.evaluation)
    text, alone = forked_each([["show", name, "--home", home.root] for name in ("main/2", "2")])
    assert "  z                0.9 +- 0.01, of 200, held out\n" in text.stdout
    assert "outcome          held" in text.stdout and "held             `each >= live" in text.stdout
    assert "  a                0.3\n" in alone.stdout and "blocked          False" in alone.stdout
    assert "verdicts\n  main/2\n    outcome          held\n    broken\n      each >= live - 0.05" in alone.stdout
    assert told(home, "show 2")[0]["scores"]["a"]["score"] == 0.3


def test_what_was_withdrawn_later_is_marked_in_each_version_that_has_it(home: Home) -> None:
    """Until its files are gone. What came after has it no more, and what came before never had it."""
    with Store.open(home.registry) as store:
        head = store.heads()[0]
        made = NewVersion(head.name, 3, 2, "0" * 64, 1, {}, {})
        store.restate([made], [1], NewIntervention(Deed.WITHDRAW, "ada", experts=(1,)))
    (rows,) = told(home, "log --versions")
    assert {row["number"]: row["withdrawn"] for row in rows} == {3: [], 2: [1], 1: [1], 0: []}
    lines = [line for line in forked("log", "--versions", home.root).stdout.splitlines() if line.startswith("main/")]
    assert ["with expert 1, withdrawn since" in line for line in lines] == [False, True, True, False]
    with Store.open(home.registry) as store:
        store.turn("main", 1, NewIntervention(Deed.ROLLBACK, "ada"))
        store.collected("main", 2)
    (rows,) = told(home, "log --versions")
    assert {row["number"]: row["withdrawn"] for row in rows} == {3: [], 2: [], 1: [1], 0: []}
    assert "with expert 1, withdrawn since; live" in forked("log", "--versions", home.root).stdout


def test_status_says_what_is_held_and_what_ends_it(home: Home) -> None:
    (before,) = told(home, "status")
    assert before["open_cases"] == 1 and before["experts"]["quarantined"] == 1
    assert (
        before["heads"][0]["held"]["command"] == "mainstem promote main/2" and not before["heads"][0]["held"]["frozen"]
    )
    intervened(home, Deed.ROLLBACK, head="main", version=0)
    intervened(home, Deed.DISCARD, experts=(3,))
    text = forked("status", home.root).stdout
    assert "held     main/2, the newest, is not live, nor will the next be: rolled back to main/0" in text
    assert "(`mainstem promote main/2`)" in text and "open " not in text and "1 quarantined" in text
    done = forked(*before["heads"][0]["held"]["command"].split()[1:], "--home", home.root)
    assert done.returncode == 0, done.stderr
    (after,) = told(home, "status")
    assert after["heads"][0]["held"] is None and "held  " not in forked("status", home.root).stdout
