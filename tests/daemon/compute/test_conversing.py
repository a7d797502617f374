"""A command that stays, whatever it does."""

from pathlib import Path

import pytest

from daemon.compute.commands import TookTooLong
from daemon.compute.conversing import Conversation, HungUp
from tests.daemon.processes import ended, until


def conversation(script: str, heard: list[str]) -> Conversation:
    return Conversation(["sh", "-c", script], Path("/"), "x", heard.append, {"SAID": "from outside"})


def test_it_answers_as_often_as_it_is_asked_and_may_say_more() -> None:
    heard: list[str] = []
    script = """while read -r line; do
        echo "$SAID" >&2; echo '[1]'; echo '{"y": 2}'; echo "{\\"x\\": $line}"
    done"""
    with conversation(script, heard) as asked:
        assert asked.ask({"n": 1}, 60) == {"x": {"n": 1}}
        assert asked.ask({"n": 2}, 60) == {"x": {"n": 2}}
    assert heard.count("from outside") >= 1 and heard.count("[1]") == heard.count('{"y": 2}') == 2


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("read -r line; echo wrong >&2; exit 3", r"ended \(exit status 3\): wrong"),
        ("echo early >&2; exec 0<&-; exit 0", r"ended \(exit status 0\): early"),
        ("kill -9 $$", "was ended by SIGKILL: the machine's memory may have run out"),
    ],
    ids=["fails", "reads nothing", "killed"],
)
def test_one_that_hangs_up(script: str, why: str) -> None:
    with conversation(script, []) as asked, pytest.raises(HungUp, match=why):
        asked.ask({}, 60)


def test_one_that_hangs_is_gone_afterwards(tmp_path: Path) -> None:
    script = f"(sleep 1000 & echo $! > {tmp_path}/pid); echo here >&2; sleep 1000"
    with conversation(script, []) as asked, pytest.raises(TookTooLong):
        asked.ask({}, 0.5)
    assert asked.last() == ": here"
    assert until(lambda: ended(int((tmp_path / "pid").read_text())), 60)
