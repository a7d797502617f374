"""`mainstem config check` says what the rules of the gate mean, and which head it does not find."""

import shutil

import pytest

from daemon.layout import Home
from tests.daemon.processes import forked

EVALUATE = '[evaluate]\ncommand = ["python", "score.py", "{folder}"]\n'
RULES = "require = ['each >= live - 0.02', '\"sort\" >= 0.7 else reject']\n"


def check(home: Home, text: str) -> tuple[int, str]:
    home.config.write_text(text)
    done = forked("config", "check", "--home", home.root)
    return done.returncode, done.stdout + done.stderr


def test_each_rule_is_put_into_words(home: Home) -> None:
    status, said = check(home, EVALUATE + RULES)
    assert status == 0
    assert said.splitlines() == [
        "each >= live - 0.02: no task may lose more than 0.02 against the live version; else the version is held",
        '"sort" >= 0.7 else reject: the task "sort" must score 0.7 or better; else the expert is rejected',
        f"{home.config} is fine",
    ]


@pytest.mark.parametrize(
    ("program", "said", "done"),
    [
        ("no-such-scorer", "no program no-such-scorer is on PATH", "environment = {PATH = '%s/bin'}\n"),
        ("bin/no-such-scorer", "/bin/no-such-scorer is not executable", ""),
        ("./score", "/score: put it there, or give", ""),
    ],
)
def test_the_program_that_scores_must_be_there(home: Home, program: str, said: str, done: str) -> None:
    """Found as it will be run: on the PATH that is set for it, or from the home. The hint followed, it is."""
    file = home.root / "bin" / "no-such-scorer"
    file.parent.mkdir()
    file.touch(mode=0o644)
    text = f"[evaluate]\ncommand = ['{program}', '{{folder}}']\n"
    status, out = check(home, text)
    assert status == 1 and out.startswith("mainstem: evaluate.command: ")
    assert said in out.replace("\n    hint", "")
    file.chmod(0o755)
    shutil.copy(file, home.root / "score")
    assert check(home, text + done.replace("%s", str(home.root)))[0] == 0


def test_a_rule_that_is_none_is_refused_with_what_one_is(home: Home) -> None:
    status, said = check(home, EVALUATE + "require = ['each > live']\n")
    assert status == 1 and "the rule `each > live`: at letter 6" in said and "SUBJECT >= REFERENCE" in said


def test_a_head_to_be_scored_is_one_of_the_homes(home: Home) -> None:
    status, said = check(home, EVALUATE + 'heads = ["main", "mian"]\n')
    assert status == 1 and "evaluate.heads names mian, but this home has no such head" in said
    assert "leave it out" in said
    assert "its heads are main" in said
    assert check(home, EVALUATE + 'heads = ["main"]\n')[0] == 0
    assert check(home, '[evaluate]\nheads = ["mian"]\n')[0] == 0  # nothing is scored
