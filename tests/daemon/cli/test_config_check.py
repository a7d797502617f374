"""`mainstem config check` says what the rules of the gate mean, and which head it does not find."""

import shutil

import pytest

from daemon.config import load
from daemon.errors import BadConfig
from daemon.layout import Home
from tests.daemon.homes import drain
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


def test_a_head_to_be_scored_may_come_later_beside_one_that_is_there(home: Home) -> None:
    """A slip of the pen that left nothing judged is refused; the hints followed, all is well."""
    status, said = check(home, EVALUATE + 'heads = ["main", "ada"]\n')
    assert status == 0 and f"{home.config} is fine" in said
    assert "mainstem: evaluate.heads names ada, which this home does not have: once added, it is judged from" in said
    assert "its heads are main; `mainstem rebuild --head ada=ema` adds it" in said
    drain(home, load(home.config))  # the daemon starts
    status, said = check(home, EVALUATE + 'heads = ["mian"]\n')
    assert status == 1 and "evaluate.heads names mian alone, which this home does not have" in said
    assert "its heads are main; name one of them, too, or `mainstem rebuild --head mian=ema` adds it" in said
    with pytest.raises(BadConfig, match="mian alone"):
        drain(home, load(home.config))
    assert forked("rebuild", "--head", "mian=ema", "--home", home.root).returncode == 0
    assert check(home, EVALUATE + 'heads = ["mian"]\n') == (0, f"{home.config} is fine\n")
    assert check(home, EVALUATE + 'heads = ["main"]\n')[0] == 0
    assert check(home, '[evaluate]\nheads = ["none"]\n')[0] == 0  # nothing is scored
    status, said = check(home, "[heads.none.adapter]\nrank = 4\n")
    assert status == 1 and "heads.none is set, but this home has no such head" in said
