"""The evaluator is somebody else's program: whatever it does, its scores are read or there are none, and it is gone."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest

from daemon.compute.progress import Abandoned, Progress
from daemon.config import Evaluate
from daemon.errors import NoScores, Reason
from daemon.evaluation.evaluator import LOG_BYTES, MOST_LINES, Evaluated, Evaluator, command_sha256
from registry.records import Score
from tests.daemon.processes import ended, until

ROOT = Path(__file__).parents[3]
SCORES = "echo '{\"sort\": 0.5}'"
LONG = 60  # seconds, which no test waits for


def settings(script: str, *arguments: str, **more: Any) -> Evaluate:
    """A shell runs the script; its $0 is the folder."""
    return Evaluate(command=("sh", "-c", script, "{folder}", *arguments), **more)


def run(home: Path, script: str, *arguments: str, **more: Any) -> Evaluated:
    return Evaluator(settings(script, *arguments, **more), home).run(home / "a folder", {"number": 3})


def processes(path: Path, count: int) -> list[int]:
    """The process ids that a script wrote, once there are so many."""
    assert until(lambda: path.exists() and len(path.read_text().split()) == count, LONG)
    return [int(word) for word in path.read_text().split()]


def gone(found: list[int]) -> bool:
    return until(lambda: all(map(ended, found)), LONG)


def test_the_command_gets_the_folder_and_the_description(tmp_path: Path) -> None:
    """Without a shell, so that a name with blanks or quotes is one argument; in the home."""
    script = (
        "import json, os, sys; said = sys.argv[1:], os.getcwd(), json.load(sys.stdin);"
        " json.dump(said, open('said', 'w')); print({})"
    )
    wanted = ("model={folder}", "{folder}'s", '{"a": "{other}"}', "$HOME")
    evaluator = Evaluator(Evaluate(command=(sys.executable, "-S", "-c", script, *wanted)), tmp_path)
    with pytest.raises(NoScores, match="no task"):
        evaluator.run(Path("a b"), {"note": "ä" * 10})
    folder = str(Path("a b").absolute())
    said = json.loads((tmp_path / "said").read_text())
    assert said[0] == [f"model={folder}", f"{folder}'s", '{"a": "{other}"}', "$HOME"]
    assert said[1:] == [str(tmp_path), {"note": "ä" * 10}]


def test_a_description_longer_than_a_pipe_holds_may_be_read_or_not(tmp_path: Path) -> None:
    long = {"text": "x" * 300_000}
    read, unread = (
        settings(f'test "$(wc -c)" -gt 300000 && {SCORES}'),
        settings(SCORES, environment={"A": "x" * 100_000}),
    )
    for one in (read, unread):
        assert Evaluator(one, tmp_path).run(tmp_path, long).scores == {"sort": Score(0.5)}


def test_what_it_says_on_standard_error_is_heard_and_all_is_kept(tmp_path: Path) -> None:
    heard: list[str] = []
    script = r"printf 'one\n\n\033[1mtwo\tand\n 10%%\r 20%%\rlast' >&2; " + SCORES
    given = Evaluator(settings(script), tmp_path, hear=heard.append).run(tmp_path, {})
    assert heard == ["one", r"\x1b[1mtwo and", "10%", "20%"]
    assert b" 20%\rlast" in given.log and b'{"sort": 0.5}' in given.log and given.seconds > 0


def test_no_token_of_ours_is_in_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluators = "MAINSTEM_EVALUATE__ENVIRONMENT", "MAINSTEM_EVALUATE__ENVIRONMENT__HF_TOKEN", "mainstem_evaluate"
    for name in ("MAINSTEM_TOKEN", "mainstem_http__write_token", "MAINSTEM_HTTP", *evaluators, "KEPT"):
        monkeypatch.setenv(name, "so-and-so")
    script = f'test "$(env | grep -c so-and-so)" = 1 && test "$KEPT$ADDED" = so-and-so2 && {SCORES}'
    assert run(tmp_path, script, environment={"ADDED": "2"}).scores == {"sort": Score(0.5)}


def test_a_results_file_in_the_output_folder_is_read(tmp_path: Path) -> None:
    results = {"results": {"arc": {"acc,none": 0.4}}, "versions": {}, "higher_is_better": {"arc": {"acc": True}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    script = (
        "test -z \"$(ls $1)\" && mkdir $1/model && cp results.json $1/model/results_2026-11-27.json && echo '|table|'"
    )
    assert run(tmp_path, script, "{output}").scores == {"arc": Score(0.4)}
    with pytest.raises(NoScores, match="left 2 files"):
        run(tmp_path, f"{script} && cp results.json $1", "{output}")
    with pytest.raises(NoScores, match=r"there is no results\*\.json in \{output\}, and what the evaluator printed"):
        run(tmp_path, "ln -s $PWD/results.json $1; echo '|table|'", "{output}")
    assert run(tmp_path, f"echo $1 > where; {SCORES}", "{output}").scores == {"sort": Score(0.5)}
    assert not Path((tmp_path / "where").read_text().strip()).exists()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (f"{SCORES}; echo 'no such model' >&2; exit 3", r"failed \(exit status 3\): no such model$"),
        (f"{SCORES}; kill -SEGV $$", r"ended by SIGSEGV$"),
        (f"{SCORES}; kill -KILL $$", r"ended by SIGKILL: the machine's memory may have run out$"),
        ("echo done", r"no JSON object: it ends with `done`$"),
        ("true", r"printed nothing"),
    ],
)
def test_a_failure_is_one_of_the_evaluator(tmp_path: Path, script: str, said: str) -> None:
    with pytest.raises(NoScores, match=said) as no:
        run(tmp_path, script)
    assert no.value.reason is Reason.EVALUATION and no.value.hint and (b"sort" in no.value.log) == ("sort" in script)


@pytest.mark.parametrize(("program", "status"), [("no-such-program", 127), ("/", 126)])
def test_what_cannot_be_run_is_said(tmp_path: Path, program: str, status: int) -> None:
    with pytest.raises(NoScores, match=rf"\(exit status {status}\): {program} cannot be run"):
        Evaluator(Evaluate(command=(program, "{folder}")), tmp_path).run(tmp_path, {})


@pytest.mark.parametrize("closing", ["", "exec >&- 2>&-; "], ids=["holds its outputs open", "has closed its outputs"])
def test_it_is_ended_at_its_time_with_all_it_started(tmp_path: Path, closing: str) -> None:
    with pytest.raises(NoScores, match=r"took longer than 0\.5 s") as no:
        run(tmp_path, f"{closing}sleep {LONG} & echo $! $$ > pids; wait", timeout_seconds=0.5)
    assert "evaluate.timeout_seconds" in no.value.hint
    assert gone(processes(tmp_path / "pids", 2))


def test_what_it_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    """It holds the outputs open, for which nobody waits."""
    assert run(tmp_path, f"sleep {LONG} & echo $! > pids; {SCORES}", timeout_seconds=LONG).scores
    assert gone(processes(tmp_path / "pids", 1))


def test_what_left_its_group_is_not_waited_for(tmp_path: Path) -> None:
    begun = time.monotonic()
    script = f"setsid sleep {LONG} & echo $! > pids; while test ! -s pids; do :; done; {SCORES}"
    try:
        assert run(tmp_path, script).scores == {"sort": Score(0.5)}
        assert time.monotonic() - begun < LONG / 2  # it was there when we went on
    finally:
        for found in processes(tmp_path / "pids", 1):
            os.kill(found, signal.SIGKILL)


def test_it_may_close_its_outputs_early(tmp_path: Path) -> None:
    assert run(tmp_path, f"{SCORES}; exec >&- 2>&-; sleep 0.2; exit 0").scores == {"sort": Score(0.5)}
    with pytest.raises(NoScores, match="exit status 4"):
        run(tmp_path, f"{SCORES}; exec >&- 2>&-; sleep 0.2; exit 4")


@pytest.mark.parametrize(
    "flood", ["head -c 20000000 /dev/zero", "yes a line that is neither short nor long | head -c 20000000"]
)
def test_what_it_prints_does_not_fill_the_memory(tmp_path: Path, flood: str) -> None:
    heard = 0

    def hear(_: str) -> None:
        nonlocal heard
        heard += 1

    tracemalloc.start()
    try:
        given = Evaluator(settings(f"({flood}) >&2; {SCORES}"), tmp_path, hear=hear).run(tmp_path, {})
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()
    assert given.scores == {"sort": Score(0.5)} and len(given.log) == LOG_BYTES and heard <= MOST_LINES


def test_a_flood_on_standard_output_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(NoScores, match="printed more than 16777216 bytes") as no:
        run(tmp_path, "echo $$ > pids; yes")
    assert len(no.value.log) == LOG_BYTES and gone(processes(tmp_path / "pids", 1))


def test_a_daemon_that_stops_lets_go_of_it(tmp_path: Path) -> None:
    stopping = Event()
    evaluator = Evaluator(
        settings(f"sleep {LONG} & echo $! $$ > pids; wait"), tmp_path, Progress(stopping, lambda _: None)
    )
    timer = Timer(0.3, stopping.set)
    timer.start()
    with pytest.raises(Abandoned):
        evaluator.run(tmp_path, {})
    timer.join()
    assert gone(processes(tmp_path / "pids", 2))


def test_it_ends_when_whoever_runs_it_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from daemon.config import Evaluate;"
        " from daemon.evaluation.evaluator import Evaluator; home = Path(sys.argv[1]);"
        " Evaluator(Evaluate(command=('sh', '-c', sys.argv[2], '{folder}')), home).run(home, {})"
    )
    command = f"trap '' TERM HUP; sleep {LONG} & echo $! $$ $PPID > pids; wait"
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), command], cwd=ROOT)
    found = processes(tmp_path / "pids", 3)
    assert not any(map(ended, found))
    process.kill()
    process.wait()
    assert gone(found)


def test_scores_depend_on_the_command_and_its_environment() -> None:
    plain, same, other = settings("a"), settings("a", timeout_seconds=1), settings("b")
    given = settings("a", environment={"LIMIT": "1"})
    assert len({command_sha256(one) for one in (plain, same, other, given)}) == 3
    assert command_sha256(plain) == command_sha256(same)
