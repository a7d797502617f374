"""`mainstem rebuild --adamerging`: coefficients learned by what a command answers, and what becomes of them."""

import json
import os
import resource
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from daemon.config import Settings
from daemon.home.standing import Held, held, outcome
from daemon.interventions.deeds import Request, carry_out
from daemon.layout import Home
from daemon.rebuild.commands import add_head, into, learn_again
from daemon.rebuild.learning import learning
from daemon.rebuild.replay import Console
from projector.methods import make
from projector.text import size
from registry.records import LEARNED, Deed
from registry.store import Store
from tests import shims
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, live, put, quick
from tests.daemon.processes import environment, forked, preloaded, rebuild, until
from tests.daemon.rebuilds import check, killed, refused, taken_out, weights
from tests.models import read_weights, write_expert

# It hands out the same gradients at every step, and tells the entropy from the step: no model is needed for that.
ANSWERS = """
import json, shutil, sys
print("a line that is no answer", file=sys.stderr)
for line in sys.stdin:
    asked = json.loads(line)
    shutil.copy("gradients.safetensors", asked["gradients"])
    with open("asked", "a") as file:
        print(asked["step"], file=file)
    print("nor is this")
    print(json.dumps({"entropy": 2 - asked["step"] / 10}), flush=True)
"""


@pytest.fixture
def command(model: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the current folder, with the gradients that it hands out: of the embedding and of the first layer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "answers.py").write_text(ANSWERS)
    torch.manual_seed(0)
    own = {name: one for name, one in read_weights(model[0]).items() if name.startswith(("embed", "layers.0"))}
    save_file({name: torch.randn_like(one) for name, one in own.items()}, tmp_path / "gradients.safetensors")
    return shlex.join([sys.executable, "-S", "answers.py", "{folder}"])


def learnt(
    model: tuple[Path, list[Path]], which: Sequence[int], gradients: dict[str, Tensor], steps: int, start: float = 0.3
) -> dict[str, Tensor]:
    """What torch's Adam makes of the coefficients of these experts, of which the third counts 2.5 times; float64."""
    base, given = weights(model, *which)
    counts = torch.tensor([2.5 if i == 2 else 1.0 for i in which], dtype=torch.float64)
    merged = dict(base)
    for name, theta0 in base.items():
        if theta0.is_floating_point():
            taus = torch.stack([(one[name] - theta0).double() for one in given])
            taus = taus * counts.reshape(-1, *[1] * theta0.ndim)
            shares = torch.full((len(given),), start, dtype=torch.float64, requires_grad=True)
            adam = torch.optim.Adam([shares], 1e-3)
            for _ in range(steps if name in gradients else 0):
                adam.zero_grad()
                shares.grad = (taus * gradients[name].double()).flatten(1).sum(1)
                adam.step()
            merged[name] = theta0.double() + torch.einsum("t,t...->...", shares.detach(), taus)
    return merged


def test_a_head_is_learned_stays_and_is_learned_again(
    merged: Home, model: tuple[Path, list[Path]], command: str, tmp_path: Path
) -> None:
    gradients = read_weights(tmp_path / "gradients.safetensors")
    said = rebuild(merged, "--head", "ada", "--adamerging", command, "--steps", "12")
    assert "ada/4: 4 experts are merged, with coefficients that were learned" in said
    assert_close(latest(merged, "ada"), learnt(model, [0, 1, 2, 3], gradients, 12))
    manifest = json.loads(merged.manifest("ada", 4).read_bytes())
    about = manifest["adamerging"]
    assert (about["steps"], about["lr"], about["start"]) == (12, 1e-3, 0.3)
    assert about["entropy"] == [
        pytest.approx(1.75),
        pytest.approx(1.15),
    ]  # of both halves of the steps
    table = json.loads((merged.version("ada", 4) / about["file"]).read_bytes())
    assert [one["name"] for one in table["experts"]] == ["a.safetensors", "b", "c", "d"]
    assert table["coefficients"]["layers.1.up.weight"] == [0.3] * 4  # no gradient
    assert len(table["entropies"]) == 12 and table["coefficients"]["embed_tokens.weight"] != [0.3] * 4
    assert "arXiv 2310.02575" in (merged.version("ada", 4) / "README.md").read_text()
    check(merged)

    put(merged, write_expert(tmp_path / "e.safetensors", model[0], 9))
    drain(merged)
    assert (live(merged), live(merged, "ada")) == (5, 4)  # what comes is folded, and is not live there
    again = "promoted, it is the plain sum; `mainstem rebuild --head ada --adamerging COMMAND` learns them again"
    assert standing(merged) == Held(5, f"{LEARNED}: {again}", True, "mainstem promote ada/5")
    taken_out(merged, quick(), "e.safetensors")
    assert live(merged, "ada") == 6 and standing(merged) is None  # as it was: its coefficients are of just the others
    assert_close(latest(merged, "ada"), learnt(model, [0, 1, 2, 3], gradients, 12))

    put(merged, write_expert(tmp_path / "f.safetensors", model[0], 10))
    drain(merged)
    rebuild(merged, "--head", "sum", "--method", "task_arithmetic")
    assert (live(merged, "ada"), live(merged, "sum")) == (6, 7)  # which is no reason to hold another head
    rebuild(merged, "--head", "sum", "--adamerging", command, "--steps", "1")
    assert (live(merged, "ada"), live(merged, "sum"), live(merged)) == (6, 8, 8)  # nor to let one live that waits
    assert standing(merged) == Held(8, f"{LEARNED}: {again}", True, "mainstem promote ada/8")
    said = rebuild(merged, "--head", "ada", "--adamerging", command, "--steps", "3")
    assert "ada/9: 5 experts are merged" in said and live(merged, "ada") == live(merged) == 9
    assert len(json.loads((merged.version("ada", 9) / about["file"]).read_bytes())["experts"]) == 5
    assert "were already" in rebuild(merged, "--head", "ada", "--adamerging", command, "--steps", "3")
    taken_out(merged, quick(), "1", "f.safetensors")  # by subtraction, at the scale that all began with
    assert live(merged, "ada") == 10 and json.loads(merged.manifest("ada", 10).read_bytes())["adamerging"] is None
    assert_close(latest(merged, "ada"), learnt(model, [1, 2, 3], {}, 0))
    check(merged)


def standing(home: Home) -> Held | None:
    with lineage(home) as reader:
        head = reader.head("ada")
        assert head is not None
        return held(home, reader, head)


def test_killed_it_goes_on_and_a_new_home_takes_it_too(
    merged: Home, model: tuple[Path, list[Path]], command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = Home(tmp_path / "new")
    words = (
        "--into",
        target.root,
        "--head",
        "soup=mean",
        "--adamerging",
        command,
        "--steps",
        "8",
        "--set",
        "scale=0.2",
    )
    (tmp_path / "answers.py").write_text(
        ANSWERS.replace("asked = json", "sys.exit(9) if '\"step\": 5' in line else 0\n    asked = json")
    )
    assert "step 6 of 8: the command of --adamerging ended (exit status 9)" in " ".join(refused(merged, *words).split())
    (tmp_path / "answers.py").write_text(ANSWERS)
    killed(monkeypatch, "commit.before=kill:1", merged, *words)
    assert live(target) == 4 and target.learning("main").exists()
    assert (tmp_path / "asked").read_text().split() == list("01234567")
    (tmp_path / "asked").unlink()
    rebuild(merged, *words)
    assert not (tmp_path / "asked").exists()  # all steps were kept
    wanted = learnt(model, [0, 1, 2, 3], read_weights(tmp_path / "gradients.safetensors"), 8, 0.2)
    assert_close(latest(target), wanted)
    assert live(target) == live(target, "soup") == 5
    check(target)
    rebuild(merged, *words)
    assert live(target) == 5 and not (tmp_path / "asked").exists()  # there is nothing left to do


def test_what_makes_a_head_with_coefficients_anew_is_told_how_it_is_learned_again(merged: Home, command: str) -> None:
    """As whoever was interrupted once the head was committed."""
    learns = ("--adamerging", command, "--steps", "1")
    rebuild(merged, "--head", "ada=task_arithmetic", *learns)
    for words in (("--head", "ada=task_arithmetic"), ("--head", "ada", "--set", "scale=0.3")):
        said = " ".join(refused(merged, *words, *learns).split())
        assert (
            "there is a head 'ada' already hint: leave its method and --set out: `--head ada` learns it again" in said
        )
    assert "were already" in rebuild(merged, "--head", "ada", *learns)


def test_a_dry_run_counts_the_steps_that_are_left(merged: Home, command: str, tmp_path: Path) -> None:
    ada = ("--head", "ada", "--adamerging", command, "--steps")
    read, said = (
        sum(one.size_bytes for one in experts(merged)),
        "the command on its batches, as a rule one of each task",
    )
    with lineage(merged) as reader:
        base = reader.base()
    read += base.size_bytes
    moved = f"{size(8 * base.parameters)} of weights and gradients"
    whole = f"each runs {said}, reads {size(read)} of experts and base, and writes and reads {moved}; "

    def told(*words: str | Path) -> str:
        return rebuild(merged, *words, "--dry-run")

    assert f"8 steps: {whole}{size(8 * (read + 16 * base.parameters))} in all" in told(*ada, "8")
    assert not merged.learning("ada").exists()
    assert f"8 steps: {whole}" in told("--into", tmp_path / "new", *ada[2:], "8")
    (tmp_path / "answers.py").write_text(
        ANSWERS.replace("asked = json", "sys.exit(9) if '\"step\": 5' in line else 0\n    asked = json")
    )
    refused(merged, *ada, "8")
    assert "3 steps of 8, behind the 5 that are kept: each" in told(*ada, "8")
    (tmp_path / "answers.py").write_text(ANSWERS)
    rebuild(merged, *ada, "8")
    assert "the coefficients of ada are learned in this way already" in told(*ada, "8")
    assert "9 steps: each" in told(*ada, "9")
    assert (tmp_path / "asked").read_text().split() == list("01234567")


def test_more_experts_than_files_may_be_open_by_default(merged: Home, command: str) -> None:
    """They are all open at a time, and the usual limit of 1024 is a soft one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    method, how = make("task_arithmetic"), learning(command, quick().evaluate, steps=1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(1024, hard - 1), hard))
    try:
        add_head(merged, quick(), "ada", method, Console(), how=how)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_rolled_back_and_promoted_a_learned_head_waits_as_before(merged: Home, command: str) -> None:
    add_head(
        merged, quick(), "ada", make("task_arithmetic"), Console(), how=learning(command, quick().evaluate, steps=1)
    )
    with Store.open(merged.registry) as store:
        for deed, number in ((Deed.ROLLBACK, 0), (Deed.PROMOTE, 4)):
            said = carry_out(merged, store, Request(deed, "ada", head="ada", version=number))
    assert said == ["ada/4 is live; what follows it is held until its coefficients are learned, too"]
    with lineage(merged) as reader:
        head = reader.head("ada")
    assert head is not None and (head.live, head.frozen) == (4, LEARNED)


def test_all_reasons_for_which_a_learned_head_waits_are_told(
    merged: Home, model: tuple[Path, list[Path]], command: str, tmp_path: Path
) -> None:
    """The gate's alone would let a person promote another model than what is live, unknowingly."""
    settings = gate(merged, {"ada/5": 0.4}, "each >= live - 0.05")
    how = learning(command, settings.evaluate, steps=1)
    add_head(merged, settings, "ada", make("task_arithmetic"), Console(), how=how)
    put(merged, write_expert(tmp_path / "e.safetensors", model[0], 9))
    drain(merged, settings)
    found = standing(merged)
    assert live(merged, "ada") == 4 and found and found.frozen
    rule, _, other = found.why.partition("; and ")
    assert rule.startswith("`each >= live - 0.05`: `a` 0.4 against 0.5") and other.startswith(f"{LEARNED}: promoted,")
    said = forked("status", merged.root).stdout
    assert f"nor will the next be: {found.why} (`mainstem promote ada/5`)" in said
    with lineage(merged) as reader:
        (expert,) = reader.find_experts("e.safetensors")
        assert outcome(reader, expert)[1]["ada"].why == f"{rule}; and {LEARNED}"
    said = forked("promote", "ada/5", "--home", merged.root, "--dry-run").stdout
    assert "ada/5 has no coefficients that were learned, as ada/4 has: it is the plain sum" in said
    assert forked("rollback", "ada/0", "--home", merged.root).returncode == 0
    rolled = standing(merged)  # nothing that was learned is live, and a person's word comes first
    assert rolled and rolled.why == "rolled back to ada/0"
    rebuild(merged, *shlex.split(other.split("`")[1].replace("COMMAND", shlex.quote(command)))[2:], "--steps", "1")
    assert forked("promote", "ada/6", "--home", merged.root).returncode == 0
    assert live(merged, "ada") == 6 and standing(merged) is None


def test_what_a_person_rolled_back_waits_however_often_it_is_learned(merged: Home, command: str) -> None:
    """Its experts are those of the live version all the while."""
    how = [learning(command, quick().evaluate, steps=steps) for steps in (1, 2, 3)]
    add_head(merged, quick(), "ada", make("task_arithmetic"), Console(), how=how[0])
    learn_again(merged, quick(), "ada", Console(), how[1])
    assert forked("rollback", "ada/4", "--home", merged.root).returncode == 0
    plan = learn_again(merged, quick(), "ada", Console(), how[2])
    assert (live(merged, "ada"), live(merged)) == (4, 6)
    assert plan.notes == ["ada/6 is not live (rolled back to ada/4); `mainstem promote ada/6` makes it live"]
    assert forked("promote", "ada/6", "--home", merged.root).returncode == 0
    assert live(merged, "ada") == 6 and standing(merged) is None
    check(merged)


SCORES = """
import json, sys
told = json.load(sys.stdin)
json.dump(told, open("told.json", "w"))
print(json.dumps({"a": json.load(open("scores.json")).get(f"{told['head']}/{told['version']}", 0.5)}))
"""


def gate(home: Home, scores: dict[str, float], *rules: str) -> Settings:
    """A gate for the heads `ada` and `soup`, with an evaluator that says so much of their versions."""
    (home.root / "score.py").write_text(SCORES)
    (home.root / "scores.json").write_text(json.dumps(scores))
    said = {"command": [sys.executable, "-S", "score.py", "{folder}"], "require": rules, "heads": ["ada", "soup"]}
    home.config.write_text("[evaluate]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in said.items()))
    return quick(evaluate=said)


def test_what_is_learned_is_judged_as_an_arrival_is(
    merged: Home, model: tuple[Path, list[Path]], command: str, tmp_path: Path
) -> None:
    """Held, it is not live, and nothing that is done to other heads or to experts makes it so."""
    settings = gate(merged, {"ada/5": 0.4}, "each >= live - 0.05")
    notes = {"ada": [], "other": ["other is not judged: evaluate.heads names ada, soup, and not other"]}
    for name, wanted in notes.items():
        assert add_head(merged, settings, name, make("task_arithmetic"), Console()).notes == wanted
    assert live(merged, "ada") == 4
    said = rebuild(merged, "--head", "ada", "--adamerging", command, "--steps", "1")
    why = "`each >= live - 0.05`: `a` 0.4 against 0.5: 0.1 worse than the live version, asked is at most 0.05 worse"
    assert f"ada/5 is not live ({why})" in said
    assert standing(merged) == Held(5, why, False, "mainstem promote ada/5")
    assert (live(merged, "ada"), live(merged)) == (4, 5)
    told = json.loads((merged.root / "told.json").read_bytes())
    assert (told["head"], told["version"], told["parent"], told["expert"]) == ("ada", 5, 4, None)
    manifest = json.loads(merged.manifest("ada", 5).read_bytes())
    assert manifest["verdict"]["against"] == "ada/4" and manifest["scores"]["a"]["score"] == 0.4
    with lineage(merged) as reader:
        version = reader.version("ada", 5)
    assert version and version.evaluation and version.verdict and version.verdict["outcome"] == "held"

    learn_again(merged, settings, "other", Console(), learning(command, settings.evaluate, steps=1))
    assert (live(merged, "ada"), live(merged, "other")) == (4, 6)
    assert standing(merged) == Held(6, why, False, "mainstem promote ada/6")
    with lineage(merged) as reader:
        same = reader.version("ada", 6)  # and of the same weights the same is said
    assert same and (same.verdict, same.evaluation) == (version.verdict, version.evaluation)
    put(merged, write_expert(tmp_path / "e.safetensors", model[0], 9))
    drain(merged)
    assert live(merged, "ada") == 7
    taken_out(merged, quick(), "e.safetensors")  # for which no version that is held comes back
    assert live(merged, "ada") == 8 and json.loads(merged.manifest("ada", 8).read_bytes())["adamerging"] is None
    check(merged)


def test_what_the_gate_rejects_or_holds_of_a_new_head_is_not_live(merged: Home, command: str, tmp_path: Path) -> None:
    """A plain rebuild fares as one that learns does. What the hint says is true: nothing is learned twice."""
    ada = ("--head", "ada", "--adamerging", command, "--steps", "2")
    scores = {"ada/4": 0.4}
    settings = gate(merged, scores, "each >= live - 0.05 else reject")
    for words in (("--head", "ada", "--method", "emr"), ada):
        said = " ".join(refused(merged, *words).split())
        assert "ada/4 breaks a rule: `each >= live - 0.05 else reject`: `a` 0.4 against 0.5" in said
        assert not merged.versions("ada").exists() and not merged.states("ada").exists()
        assert not list(merged.tmp.iterdir())
    (tmp_path / "asked").unlink()
    settings = gate(merged, scores, "each >= live - 0.05")
    add_head(merged, settings, "ada", make("task_arithmetic"), Console(), how=learning(command, settings.evaluate, 2))
    found = standing(merged)
    assert found and not found.frozen and found.why.startswith("`each >= live - 0.05`: `a` 0.4 against 0.5")
    assert live(merged, "ada") == 0 and not (tmp_path / "asked").exists()
    add_head(merged, quick(), "sum", make("task_arithmetic"), Console())
    assert live(merged, "sum") == 4  # no expert is to blame for what is held
    settings = gate(merged, {"ada/6": 0.4}, "each >= live - 0.05")
    for steps in (1, 2):
        learn_again(merged, settings, "ada", Console(), learning(command, settings.evaluate, steps))
    merged.learning("ada").touch()  # as one leaves it that is killed once it has committed
    again = learn_again(merged, settings, "ada", Console(), learning(command, settings.evaluate, 2))
    assert again.number is None and not merged.learning("ada").exists()
    found = standing(merged)
    assert live(merged, "ada") == 5 and found and (found.version, found.frozen) == (6, True)
    assert found.why.startswith("`each >= live - 0.05`: `a` 0.4 against 0.5")
    add_head(merged, quick(), "more", make("task_arithmetic"), Console())
    assert live(merged, "more") == 6
    check(merged)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_evaluator_and_the_rebuild(merged: Home, number: signal.Signals) -> None:
    """Which may take an hour. The home is sound, and what is said is true: the same command goes on."""
    gate(merged, {}, "each >= live - 0.05")
    (merged.root / "score.py").write_text("import time; open('begun', 'w').close(); time.sleep(100)")
    words = ["rebuild", "--head", "ada=mean", "--home", str(merged.root)]
    with Path(os.devnull).open("wb") as nothing, (merged.root / "said").open("wb") as said:
        process = shims.Process(preloaded(), words, environment(), merged.root, nothing.fileno(), said.fileno())
        assert until((merged.root / "begun").exists, 60)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert "mainstem: interrupted; the same command goes on where it was\n" in (merged.root / "said").read_text()
    (merged.root / "score.py").write_text(SCORES)
    rebuild(merged, *words[1:3])
    assert live(merged, "ada") == 4
    check(merged)


def test_a_new_home_says_what_nobody_judged(merged: Home, tmp_path: Path) -> None:
    settings = gate(merged, {"soup/4": 0.1}, "each >= 0.3")
    new = Home(tmp_path / "new")
    (said,) = into(merged, new, settings, None, [], Console()).notes
    assert said == f"soup/4 was not judged: `mainstem evaluate soup/4 --home {new.root}`"
    for name in ("score.py", "scores.json"):
        shutil.copy(merged.root / name, new.root)
    done = forked(*said.split("`")[1].split()[1:]).stdout
    assert "soup/4 breaks a rule: `each >= 0.3`: `a` 0.1 against 0.3" in done and done.endswith("it is live\n")


def saying(answer: str, gradients: str = "gradients.safetensors") -> str:
    """A command that leaves these gradients, if any, and answers that."""
    copy = f"shutil.copy({gradients!r}, asked['gradients'])" if gradients else "pass"
    return f"import json, shutil, sys\nfor line in sys.stdin:\n    asked = json.loads(line)\n    {copy}\n    {answer}\n"


GOOD = """print('{"entropy": 1}', flush=True)"""


def test_a_command_that_fails_is_named_and_leaves_every_head_as_it_was(
    merged: Home, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = read_weights(tmp_path / "gradients.safetensors")
    save_file({**own, "embed_tokens.weight": own["embed_tokens.weight"].T.contiguous()}, tmp_path / "turned")
    (tmp_path / "torn").write_bytes(b"torn")
    cases = {
        saying(
            "sys.exit('out of memory')"
        ): "step 1 of 2: the command of --adamerging ended (exit status 1): out of memory",
        saying(
            """print('{"entropy": NaN}', flush=True)"""
        ): "step 1 of 2: the command of --adamerging answered an entropy of NaN",
        saying(GOOD, ""): "the command answered, and did not write",
        saying(
            GOOD, "turned"
        ): "the gradient by embed_tokens.weight is float32 [16, 24], the weight has shape [24, 16]",
        saying(GOOD, "torn"): "step 1 of 2: what the command of --adamerging wrote",
    }
    for program, word in cases.items():
        (tmp_path / "answers.py").write_text(program)
        said = " ".join(refused(merged, "--head", "ada", "--adamerging", command, "--steps", "2").split())
        assert word in said, said
    (tmp_path / "answers.py").write_text(saying("sys.stdin.read()"))
    monkeypatch.setenv("MAINSTEM_EVALUATE__TIMEOUT_SECONDS", "0.2")
    said = refused(merged, "--head", "ada", "--adamerging", command)
    assert "step 1 of 500: the command of --adamerging took longer than 0.2 s" in " ".join(said.split())
    with lineage(merged) as reader:
        assert [(head.name, head.live) for head in reader.heads()] == [("main", 4), ("soup", 4)]
    assert not list(merged.tmp.iterdir()) and not merged.versions("ada").exists()


def test_what_cannot_be_learned_is_refused_before_the_long_work(merged: Home, command: str) -> None:
    ada = ("--head", "ada", "--adamerging")
    cases = {
        (*ada, "none-such {folder}"): "--adamerging: no program none-such is on PATH",
        (*ada, "'"): "quote it as for a shell",
        (*ada, command, "--method", "ties"): "the head 'ada' is of ties",
        (*ada, command, "--set", "scale=norm"): "the scale of the head 'ada' is norm",
        (*ada, command, "--set", "layer_beta=0.5"): "has scales by layer",
        (*ada, command, "--set", "relative_to=trained_from"): "is relative to what experts were trained from",
        ("--head", "soup", "--adamerging", command): "the head 'soup' is of mean",
        ("--without", "1", "--adamerging", command): "--without keeps every head's method",
    }
    for words, word in cases.items():
        assert word in " ".join(refused(merged, *words).split())
    assert not merged.rebuilding("ada").exists()
