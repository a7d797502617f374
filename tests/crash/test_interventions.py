"""The process dies, or its disk fails, while it evaluates or does what a person asked for; then it is done once.

In a world of its own: the other crash tests evaluate nothing.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from daemon.disk.failpoints import DEED_POINTS, GATE_POINTS
from daemon.layout import Home
from registry.reader import Reader
from registry.records import Deed, NewIntervention, Status
from registry.store import Store
from tests.crash.daemons import LIMIT_SECONDS, Ended, Zygote
from tests.crash.invariants import History, check, sha256
from tests.crash.test_failpoints import Trace, passes
from tests.crash.worlds import MakeFolder, World, drain, fill_inbox, outcome, watch
from tests.daemon.processes import ended, until

NAMES = ("a.safetensors", "b", "e")  # live, rejected, held
EVALUATOR = """
cd state/evaluations
told=$(cat)
echo call >> calls
case $told in
*'"name": "b"'*) [ -e hang ] && { echo $$ > pid; sleep 1000; } ;;
esac
case $told in
*'"name": "b"'*) echo '{"task": 0.1}' ;;
*'"name": "e"'*) echo '{"task": 0.3}' ;;
*) echo '{"task": 0.5}' ;;
esac
"""
GATE = """
[evaluate]
command = ["sh", "state/evaluations/score.sh", "{folder}"]
require = ['"task" >= 0.4', '"task" >= 0.2 else reject']
"""
DEEDS = {
    "rollback": ("rollback", "main/0", "--reason", "why"),
    "promote": ("promote", "main/2"),
    "retry": ("quarantine", "retry", "b"),
    "discard": ("quarantine", "discard", "b"),
}


class Gated:
    """Homes with a gate."""

    def __init__(self, world: World, make_folder: MakeFolder) -> None:
        self.zygote: Zygote = world.zygote
        self.drops = [path for path in world.drops if path.name in NAMES]
        self.dropped = [sha256(path) for path in self.drops]
        self._world, self._make_folder = world, make_folder

    def home(self) -> Home:
        """A new one, with the three drops in its inbox."""
        home = self._world.home(self._make_folder("gated") / "home", fill=False)
        (home.state / "evaluations").mkdir()
        (home.state / "evaluations" / "score.sh").write_text(EVALUATOR)
        home.config.write_text(GATE)
        fill_inbox(home, self.drops)
        return home

    def ask(self, home: Home, *words: str, trace: Path | None = None, **environment: str) -> Ended:
        return self.zygote.run(*words, "--home", home.root, trace=trace, **environment)

    def check(self, home: Home, history: History, *, gone: bool = False) -> None:
        """The invariants. gone: what was refused was discarded."""
        check(home, [one for one, name in zip(self.dropped, NAMES, strict=True) if name != "b" or not gone], history)


def calls(home: Home) -> int:
    return len((home.state / "evaluations" / "calls").read_text().splitlines())


def standing(home: Home) -> list[object]:
    """What must not depend on what went wrong, beside the weights."""
    with Reader.open(home.registry) as reader:
        experts = [(one.name, one.status, one.reason) for one in reader.experts(limit=-1)]
        heads = [
            (head, [(row.number, row.held, row.expert_id, bool(row.evaluation)) for row in reader.versions(head.name)])
            for head in reader.heads()
        ]
    return [experts, heads, outcome(home)]


@pytest.fixture(scope="module")
def gated(world: World, make_folder: MakeFolder) -> Gated:
    return Gated(world, make_folder)


@pytest.fixture(scope="module")
def judged(gated: Gated, make_folder: MakeFolder) -> tuple[Home, Trace]:
    """A home over which all three were judged, and the failpoints that were passed."""
    home, trace = gated.home(), make_folder("trace") / "trace"
    done = gated.zygote.run(*drain(home), trace=trace)
    assert done.code == 0, done.log
    gated.check(home, {})
    with Reader.open(home.registry) as reader:
        head = reader.head("main")
        assert head and (head.live, head.newest, head.frozen) == (1, 2, None)
        assert {one.name: one.status for one in reader.experts()}["b"] is Status.QUARANTINED
    assert calls(home) == 3
    return home, trace.read_text().split()


def test_a_gate_passes_its_points(judged: tuple[Home, Trace]) -> None:
    assert set(GATE_POINTS) <= set(judged[1])
    assert not set(DEED_POINTS) & set(judged[1])


def cut_short(point: str, action: str, nth: int, gated: Gated, judged: Home) -> None:
    """Ends a run where it evaluates, and asserts that the next one goes on from there."""
    home, history = gated.home(), History()
    done = gated.zygote.run(*drain(home), MAINSTEM_FAILPOINT=f"{point}={action}:{nth}")
    assert done.code == (-signal.SIGKILL if action == "kill" else 1), done.log
    gated.check(home, history)
    assert sorted(os.listdir(home.inbox)) == list(NAMES)[nth - 1 :]
    done = gated.zygote.run(*drain(home))
    assert done.code == 0, done.log
    gated.check(home, history)
    assert standing(home) == standing(judged)
    assert calls(home) == 3  # what was scored before it ended is not scored again, and nothing goes unscored


@pytest.mark.parametrize("action", ["kill", "enospc"])
@pytest.mark.parametrize("point", GATE_POINTS)
def test_an_evaluation_that_is_cut_short_is_resumed(
    point: str, action: str, gated: Gated, judged: tuple[Home, Trace]
) -> None:
    """Over the expert that is rejected."""
    cut_short(point, action, 2, gated, judged[0])


def test_an_evaluator_ends_with_its_daemon_and_what_it_had_not_scored_is_scored_anew(
    gated: Gated, judged: tuple[Home, Trace]
) -> None:
    home, history = gated.home(), History()
    evaluator, hangs = home.state / "evaluations" / "pid", home.state / "evaluations" / "hang"
    hangs.touch()
    daemon = gated.zygote.start(*watch(home))
    assert until(lambda: evaluator.exists() and evaluator.read_text().endswith("\n"), LIMIT_SECONDS), daemon.log
    pid = int(evaluator.read_text())
    assert not ended(pid)
    os.kill(daemon.pid, signal.SIGKILL)
    assert daemon.wait().code == -signal.SIGKILL
    assert until(lambda: ended(pid), LIMIT_SECONDS)
    gated.check(home, history)
    assert calls(home) == 2 and sorted(os.listdir(home.inbox)) == ["b", "e"]
    hangs.unlink()
    assert gated.zygote.run(*drain(home)).code == 0
    gated.check(home, history)
    assert standing(home) == standing(judged[0])
    assert calls(home) == 4  # the one that was cut short, once more


@pytest.mark.slow
@pytest.mark.parametrize("action", ["kill", "eio", "enospc", "raise"])
@pytest.mark.parametrize("point", GATE_POINTS)
def test_an_evaluation_that_is_cut_short_at_any_pass(
    point: str, action: str, gated: Gated, judged: tuple[Home, Trace]
) -> None:
    for nth in range(1, len(passes(judged[1], point)) + 1):
        cut_short(point, action, nth, gated, judged[0])


def changed(home: Home) -> tuple[object, ...]:
    """What a deed changes."""
    with Reader.open(home.registry) as reader:
        head, deeds = reader.head("main"), [deed.deed for deed in reader.interventions()]
        open_cases = [one.id for one in reader.quarantined(10)]
    assert head
    return head.live, head.frozen, deeds, open_cases, sorted(os.listdir(home.inbox))


@pytest.fixture(scope="module", params=DEEDS)
def deed(
    request: pytest.FixtureRequest, gated: Gated, judged: tuple[Home, Trace], make_folder: MakeFolder
) -> tuple[str, tuple[object, ...], Trace]:
    """What is asked for, what then is otherwise, and the failpoints that are passed."""
    name, root = request.param, make_folder("deed")
    home = ready(name, judged[0], root / "home")
    done = gated.ask(home, *DEEDS[name], trace=root / "trace")
    assert done.code == 0, done.log
    gated.check(home, {}, gone=name == "discard")
    trace = (root / "trace").read_text().split()
    assert own_point(name) in trace
    return name, changed(home), trace


def ready(name: str, judged: Home, root: Path) -> Home:
    """A copy of the judged home in which that deed can be done: what is blocked is not retried."""
    home = copied(judged, root)
    if name == "retry":
        with Store.open(home.registry) as store:
            store.block([2], False, NewIntervention(Deed.UNBLOCK, "ann", experts=(2,)))
    return home


def own_point(deed: str) -> str:
    return DEED_POINTS[deed in ("retry", "discard")]


def test_a_deed_that_is_cut_short_is_done_when_it_is_asked_for_again(
    deed: tuple[str, tuple[object, ...], Trace], gated: Gated, judged: tuple[Home, Trace], tmp_path: Path
) -> None:
    name, after, _ = deed
    for action, code in (("kill", -signal.SIGKILL), ("eio", 1)):
        cut(name, after, f"{own_point(name)}={action}", code, gated, ready(name, judged[0], tmp_path / action))


@pytest.mark.slow
@pytest.mark.parametrize(("action", "code"), [("kill", -signal.SIGKILL), ("eio", 1), ("enospc", 1)])
def test_a_deed_that_is_cut_short_at_any_pass(
    action: str,
    code: int,
    deed: tuple[str, tuple[object, ...], Trace],
    gated: Gated,
    judged: tuple[Home, Trace],
    tmp_path: Path,
) -> None:
    name, after, trace = deed
    for point in sorted(set(trace)):
        for nth in range(1, len(passes(trace, point)) + 1):
            home = ready(name, judged[0], tmp_path / f"{point}{nth}")
            cut(name, after, f"{point}={action}:{nth}", code, gated, home)


def cut(name: str, after: tuple[object, ...], failpoint: str, code: int, gated: Gated, home: Home) -> None:
    """Ends a deed there: the home is sound, and once it was asked for again all is as if it never had."""
    before, history = changed(home), History()
    done = gated.ask(home, *DEEDS[name], MAINSTEM_FAILPOINT=failpoint)
    assert done.code == code, done.log
    gated.check(home, history, gone=name == "discard" and not (home.quarantine(2) / "b").exists())
    if changed(home) != after:
        assert changed(home)[:4] == before[:4], failpoint
        done = gated.ask(home, *DEEDS[name])
        assert done.code == 0, done.log
    assert changed(home) == after, failpoint
    gated.check(home, history, gone=name == "discard")


def copied(home: Home, root: Path) -> Home:
    return Home(shutil.copytree(home.root, root, symlinks=True))


def test_a_daemon_that_dies_over_a_rollback_has_made_it(
    gated: Gated, judged: tuple[Home, Trace], tmp_path: Path
) -> None:
    home = copied(judged[0], tmp_path / "home")
    daemon = gated.zygote.start(*watch(home), MAINSTEM_FAILPOINT="turn.after=kill")
    assert until(home.requests.exists, LIMIT_SECONDS), daemon.log
    asked = gated.ask(home, "rollback", "main/0")
    assert asked.code == 1 and "the daemon stopped before it answered" in asked.log
    assert daemon.wait().code == -signal.SIGKILL
    gated.check(home, {})
    assert json.loads((home.latest("main") / "manifest.json").read_text())["version"] == 0
