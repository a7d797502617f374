"""The gate: what goes live, what is held and what is rejected, with a real evaluator in a process of its own."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import structlog

from daemon.config import Settings
from daemon.errors import BadHome
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.merge.gate import not_judging
from daemon.rebuild.commands import described, withdraw
from daemon.rebuild.replay import Console, merged_experts
from registry.records import Deed, Expert, Flag, NewIntervention, Status, Version
from tests.daemon.homes import drain, experts, lineage, live, put, quick, tree
from tests.daemon.processes import environment, forked, running, until
from tests.models import read_weights, write_expert

EVALUATOR = """
import json, os, sys
told = json.load(sys.stdin)
folder = sys.argv[1]
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps({**told, "files": sorted(os.listdir(folder))}) + "\\n")
scores = json.load(open("scores.json"))
key = (told["expert"] or {}).get("name") if told["head"] is None else str(told["version"])
given = scores.get(key, scores["else"])
if given == "fail":
    sys.exit("no GPU")
print(json.dumps(given))
"""


@pytest.fixture
def scored(home: Home) -> Home:
    (home.root / "score.py").write_text(EVALUATOR)
    return home


def gate(**evaluate: Any) -> Settings:
    return quick(evaluate={"command": ["python3", "score.py", "{folder}"], **evaluate})


def drop(home: Home, base: Path, seed: int, scores: Mapping[str, Any], settings: Settings, task: str = "") -> Expert:
    (home.root / "scores.json").write_text(json.dumps(scores))
    path = write_expert(home.root.parent / f"expert{seed}.safetensors", base, seed)
    if task:
        folder = home.root.parent / f"expert{seed}"
        folder.mkdir()
        shutil.move(path, folder / "model.safetensors")
        (folder / "expert.json").write_text(json.dumps({"task": task}))
        path = folder
    put(home, path)
    drain(home, settings)
    return experts(home)[-1]


def calls(home: Home) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home.root / "calls.jsonl").read_text().splitlines()]


def test_who_is_not_judged_is_told_whom_the_gate_judges() -> None:
    said = {heads: not_judging(gate(heads=heads).evaluate, "ada") for heads in (("main", "ada"), ("main",), ())}
    assert said == {
        ("main", "ada"): [],
        ("main",): ["ada is not judged: evaluate.heads names main, and not ada"],
        (): ["ada is not judged: evaluate.heads names none"],
    }


def test_a_version_that_keeps_the_rules_is_live_with_its_scores(scored: Home, base: Path) -> None:
    settings = gate(require=["each >= live - 0.05", "mean >= base"])
    came = drop(scored, base, 2, {"0": {"a": 0.5, "b": 0.5}, "else": {"a": 0.6, "b": 0.5}}, settings)
    assert came.status is Status.MERGED and live(scored) == 1
    with lineage(scored) as reader:
        version, zero = reader.version("main", 1), reader.version("main", 0)
        assert version and version.held is None and version.verdict and version.verdict["outcome"] == "live"
        evaluation = reader.evaluation(version.evaluation)
        assert evaluation and {task: score.score for task, score in evaluation.scores.items()} == {"a": 0.6, "b": 0.5}
        assert zero and zero.evaluation and zero.evaluation != version.evaluation
    manifest = json.loads(scored.manifest("main", 1).read_bytes())
    assert manifest["scores"]["a"]["score"] == 0.6 and manifest["verdict"]["against"] == "main/0"
    assert "| a | 0.6 |" in (scored.version("main", 1) / "README.md").read_text()
    base_call, call = calls(scored)
    assert (base_call["version"], call["version"], call["head"], call["parent"]) == (0, 1, "main", 0)
    assert call["expert"]["name"] == came.name and call["scores"]["live"]["a"]["score"] == 0.5
    assert "config.json" in call["files"] or call["files"] == ["model.safetensors"]
    assert scored.evaluation_log("main", 1).exists()
    with lineage(scored) as reader:
        assert verify(scored, reader, lambda _: None)[1] == []


def test_one_that_breaks_a_rule_is_held_and_the_next_one_is_held_against_what_is_live(scored: Home, base: Path) -> None:
    settings = gate(require=["each >= live - 0.05"])
    scores: dict[str, Any] = {"0": {"a": 0.5}, "1": {"a": 0.3}, "2": {"a": 0.49}, "else": {"a": 0.5}}
    assert drop(scored, base, 2, scores, settings).status is Status.MERGED
    assert live(scored) == 0
    with lineage(scored) as reader:
        head, held = reader.heads()[0], reader.version("main", 1)
        assert (head.live, head.newest, head.frozen) == (0, 1, None)
        assert held and held.held and "`each >= live - 0.05`: `a` 0.3 against 0.5" in held.held
    drop(scored, base, 3, scores, settings)
    assert live(scored) == 2
    assert [call["version"] for call in calls(scored)] == [0, 1, 2]  # none is scored twice


def test_one_that_must_be_rejected_leaves_everything_as_it_was(scored: Home, base: Path) -> None:
    settings = gate(require=["own >= live + 0.1 else reject"])
    drop(scored, base, 2, {"else": {"a": 0.5}}, settings)
    before = {
        name: content for name, content in tree(scored.root).items() if name.startswith(("published", "state/heads"))
    }
    came = drop(scored, base, 3, {"else": {"a": 0.55}}, settings, task="a")
    assert (came.status, came.reason, came.blocked) == (Status.QUARANTINED, "scores", True)
    assert came.detail and "`own >= live + 0.1 else reject`" in came.detail
    after = {
        name: content for name, content in tree(scored.root).items() if name.startswith(("published", "state/heads"))
    }
    assert after == before and live(scored) == 1
    reason = json.loads((scored.quarantine(came.id) / "reason.json").read_text())
    assert reason["verdict"]["scores"]["a"]["score"] == 0.55
    again = write_expert(scored.root.parent / "again.safetensors", base, 3)
    put(scored, again)
    drain(scored, settings)
    back = experts(scored)[-1]
    assert (back.status, back.duplicate_of) == (Status.DUPLICATE, came.id)
    assert back.detail and "does not come back" in back.detail


def test_without_a_gate_one_that_is_far_too_long_is_flagged_after_two_others(home: Home, base: Path) -> None:
    for seed, scale in ((2, 0.01), (3, 0.01), (4, 0.046)):
        put(home, write_expert(home.root.parent / f"{seed}.safetensors", base, seed, scale))
    with structlog.testing.capture_logs() as said:
        drain(home)
    assert live(home) == 3
    assert [one.flags for one in experts(home)] == [(), (), (Flag.LONG,)]
    (line,) = [line for line in said if line["log_level"] == "warning"]
    assert line["flags"] == ("long",) and "4.53 times as long as is usual here" in line["detail"]
    assert "flagged" in forked("status", "--home", home.root).stdout


@pytest.mark.parametrize(("policy", "expected"), [("hold", 0), ("accept", 1)])
def test_an_evaluator_that_fails_is_no_fault_of_the_expert(
    scored: Home, base: Path, policy: str, expected: int
) -> None:
    came = drop(scored, base, 2, {"else": "fail"}, gate(on_error=policy))
    assert came.status is Status.MERGED and live(scored) == expected
    with lineage(scored) as reader:
        version = reader.version("main", 1)
    assert version and version.verdict and "no GPU" in version.verdict["error"]
    assert (version.held is None) == (policy == "accept")
    assert b"no GPU" in scored.evaluation_log("main", 1).read_bytes()


@pytest.mark.parametrize(
    ("script", "more", "said"),
    [
        ("kill -KILL $$", {}, "ended by SIGKILL"),
        ("sleep 100 & sleep 100", {"timeout_seconds": 0.3}, "took longer than 0.3 s"),
    ],
)
def test_one_that_is_killed_or_hangs_holds_the_version_which_can_be_promoted(
    home: Home, base: Path, script: str, more: dict[str, Any], said: str
) -> None:
    settings = quick(evaluate={"command": ["sh", "-c", f"echo working >&2; {script}", "{folder}"], **more})
    put(home, write_expert(home.root.parent / "expert.safetensors", base, 2))
    drain(home, settings)
    assert live(home) == 0 and experts(home)[-1].status is Status.MERGED
    with lineage(home) as reader:
        version = reader.version("main", 1)
    assert version and version.held and said in version.held and version.evaluation is None
    assert home.evaluation_log("main", 1).read_bytes() == b"working\n"
    done = forked("promote", "1", "--home", home.root)
    assert done.returncode == 0 and live(home) == 1


def test_an_expert_is_held_against_what_it_scores_by_itself(scored: Home, base: Path) -> None:
    settings = gate(require=["own >= expert - 0.1 else reject"])
    first = drop(scored, base, 2, {"expert2": {"a": 0.9}, "else": {"a": 0.1}}, settings, task="a")
    assert (
        first.status is Status.MERGED and len(calls(scored)) == 1
    )  # alone it is the merged model: its scores are known
    scores = {"expert3": {"a": 0.9}, "else": {"a": 0.85}}
    assert drop(scored, base, 3, scores, settings, task="a").status is Status.MERGED and live(scored) == 2
    _, alone, merged = calls(scored)
    assert alone["head"] is None and alone["expert"]["expert.json"]["task"] == "a"
    assert merged["scores"]["expert"]["a"]["score"] == 0.9
    with lineage(scored) as reader:
        own = reader.evaluation(experts(scored)[-1].evaluation)
        assert own and own.scores["a"].score == 0.9
    assert drop(scored, base, 4, {"expert4": {"a": 0.99}, "else": {"a": 0.85}}, settings, task="a").reason == "scores"


def test_an_evaluator_that_writes_into_the_version_stops_the_daemon(scored: Home, base: Path) -> None:
    (scored.root / "score.py").write_text(
        "import sys\nopen(sys.argv[1] + '/model.safetensors', 'ab').write(b'x')\nprint('{\"a\": 1}')"
    )
    with pytest.raises(BadHome, match="the evaluator changed what it was to score"):
        drop(scored, base, 2, {}, gate())
    assert live(scored) == 0 and experts(scored) == []
    (scored.root / "score.py").write_text("import sys\nopen(sys.argv[1] + '/cache', 'w')\nprint('{\"a\": 1}')")
    drain(scored, gate())
    assert live(scored) == 1 and not (scored.version("main", 1) / "cache").exists()
    assert read_weights(scored.version("main", 1))


def test_what_is_there_already_is_scored_when_it_is_asked_for(
    scored: Home, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the daemon and without it: a version, all of them, an expert by itself; none twice."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    drop(scored, base, 2, {"0": {"a": 0.5}, "else": {"a": 0.75}}, quick())
    drop(scored, base, 3, {"0": {"a": 0.5}, "else": {"a": 0.75}}, quick())
    assert "evaluate.command is not set" in forked("evaluate", "--home", scored.root).stderr
    scored.config.write_text('[evaluate]\ncommand = ["python3", "score.py", "{folder}"]\n')
    done = forked("evaluate", "--json", "--home", scored.root)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["main/2"]["scores"]["a"]["score"] == 0.75
    with running("run", "--home", scored.root, "--no-http") as daemon:
        assert until(lambda: any('"ready"' in line for line in daemon.lines), 30)
        done = forked("evaluate", "--all", "--expert", "2", "--home", scored.root)
        assert done.returncode == 0, done.stderr
        assert daemon.stop() == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["of", "a"], ["main/0", "0.5"], ["main/1", "0.75"], ["main/2", "0.75"], ["expert", "2", "0.75"]
    ]  # fmt: skip
    assert [call["version"] for call in calls(scored)] == [2, 0, 1, None]
    with lineage(scored) as reader:
        assert all(version.evaluation for version in reader.versions("main"))
        expert = reader.expert(2)
        assert expert and expert.evaluation and reader.interventions() == []


def test_while_the_evaluator_runs_the_daemon_says_so_and_of_what(scored: Home, base: Path) -> None:
    note = "note = json.load(open('state/daemon.json'))\njson.dump(note, open('note.json', 'w'))\n"
    (scored.root / "score.py").write_text(f"import json\n{note}print('{{\"a\": 1}}')")
    came = drop(scored, base, 2, {}, gate())
    said = json.loads((scored.root / "note.json").read_text())
    assert (said["doing"], said["merging"]) == ("evaluating", came.name) and said["evaluating_since"]


def test_a_version_that_could_not_be_judged_is_judged_once_it_is_scored_by_hand(
    scored: Home, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is told then is true, and following it makes the version live. Nothing does so by itself."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    rules = ["own >= live + 0.1"]
    drop(scored, base, 2, {"0": {"a": 0.5}, "else": "fail"}, gate(require=rules), task="a")
    command = '[evaluate]\ncommand = ["python3", "score.py", "{folder}"]\n'
    scored.config.write_text(f"{command}require = {json.dumps(rules)}\n")
    (scored.root / "scores.json").write_text(json.dumps({"1": {"a": 0.55}, "else": {"a": 0.5}}))

    def judged(*words: str) -> tuple[str, dict[str, Any], str]:
        done = forked("evaluate", "main/1", *words, "--home", scored.root)
        assert done.returncode == 0, done.stderr
        with lineage(scored) as reader:
            version = reader.version("main", 1)
        assert version and version.verdict and version.held and live(scored) == 0
        return done.stdout.splitlines()[-1], dict(version.verdict), version.held

    said, verdict, held = judged()
    assert said.startswith("main/1 breaks a rule: `own >= live + 0.1`: `a` 0.55 against 0.5") and "promote" not in said
    assert held == verdict["broken"][0]["rule"].join("``") + ": " + verdict["broken"][0]["why"]
    assert verdict["outcome"] == "held" and verdict["scores"]["a"]["score"] == 0.55 and "error" not in verdict
    (scored.root / "scores.json").write_text(json.dumps({"else": {"a": 0.75}}))
    said, verdict, held = judged("--again")
    assert said == "main/1 breaks no rule; it is still held: `mainstem promote main/1` makes it live"
    assert held == "it was scored by hand since, and breaks no rule" and verdict["broken"] == []
    assert forked(*said.split("`")[1].split()[1:], "--home", scored.root).returncode == 0 and live(scored) == 1


def test_what_an_expert_was_taken_out_of_says_that_nobody_judged_it(
    scored: Home, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command that is named judges it. Where the same weights were scored before, those are its scores."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    rules = ["each >= live - 0.05"]
    scores = {"3": {"a": 0.3}, "else": {"a": 0.5}}
    settings = gate(require=rules)
    for seed in (2, 3):
        drop(scored, base, seed, scores, settings)
    command = '[evaluate]\ncommand = ["python3", "score.py", "{folder}"]\n'
    scored.config.write_text(f"{command}require = {json.dumps(rules)}\n")

    def withdrawn(expert: int) -> list[str]:
        with lineage(scored) as reader:
            gone = merged_experts(reader, [str(expert)])
        return described(withdraw(scored, settings, gone, Console(), NewIntervention(Deed.WITHDRAW, "ada")))

    def version() -> Version:
        with lineage(scored) as reader:
            found = reader.version("main", live(scored))
        assert found and found.verdict
        return found

    assert withdrawn(1) == ["main/3: replayed", "main/3 was not judged: `mainstem evaluate main/3`"]
    made = version()
    assert made.verdict and made.verdict["outcome"] == "unjudged" and (made.held, made.evaluation) == (None, None)
    assert json.loads(scored.manifest("main", 3).read_bytes())["verdict"] == made.verdict
    done = forked(*made.verdict["notes"][0].split("`")[1].split()[1:], "--home", scored.root)
    assert done.stdout.splitlines()[-1].startswith("main/3 breaks a rule: `each >= live - 0.05`: `a` 0.3 against 0.5")
    assert done.stdout.endswith("; it is live\n") and live(scored) == 3
    judged = version().verdict or {}
    assert (judged["outcome"], judged["against"], len(judged["broken"])) == ("live", "main/2", 1)

    assert withdrawn(2)[0] == "main/4: restored"  # nothing is left: it is the base
    assert (version().verdict or {})["outcome"] == "unjudged" and version().evaluation
    assert json.loads(scored.manifest("main", 4).read_bytes())["scores"]["a"]["score"] == 0.5


def test_where_only_the_expert_by_itself_cannot_be_scored_the_version_is_held(scored: Home, base: Path) -> None:
    settings = gate(require=["each >= expert - 0.1 else reject"])
    drop(scored, base, 2, {"else": {"a": 0.5}}, settings, task="a")
    came = drop(scored, base, 3, {"expert3": "fail", "else": {"a": 0.5}}, settings, task="a")
    assert came.status is Status.MERGED and live(scored) == 1


def test_whatever_an_evaluator_leaves_in_the_version_goes(scored: Home, base: Path) -> None:
    (scored.root / "score.py").write_text(
        "import os, sys\nos.makedirs(sys.argv[1] + '/.cache/deep')\nos.symlink('/etc', sys.argv[1] + '/link')\n"
        "open(sys.argv[1] + '/.cache/deep/f', 'w')\nprint('{\"a\": 1}')"
    )
    drop(scored, base, 2, {}, gate())
    assert live(scored) == 1
    with lineage(scored) as reader:
        assert verify(scored, reader, lambda _: None)[1] == []


def test_a_rejected_expert_that_comes_again_and_again_takes_no_room(scored: Home, base: Path) -> None:
    settings = gate(require=["each >= 0.9 else reject"])
    drop(scored, base, 2, {"else": {"a": 0.5}}, settings)
    for _ in range(2):
        put(scored, write_expert(scored.root.parent / "again.safetensors", base, 2))
        drain(scored, settings)
    assert [one.status for one in experts(scored)[1:]] == [Status.DUPLICATE] * 2
    assert not list((scored.root / "archive").rglob("*.safetensors"))
