"""The language of `[evaluate] require`: what each rule means, and what is no rule."""

import re
from pathlib import Path

import pytest

from daemon.config import load
from daemon.errors import BadConfig
from daemon.requirements import GRAMMAR, parse


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("each >= live - 0.02", "no task may lose more than 0.02 against the live version"),
        ("each >= base", "no task may be worse than the base"),
        ("each >= base + 0", "no task may be worse than the base"),
        ("each >= expert - 2 se", "no task may lose more than 2 standard errors against the expert by itself"),
        ("each>=live+1se", "every task must gain at least 1 standard error against the live version"),
        ("each >= 0.5", "every task must score 0.5 or better"),
        ("mean >= live", "the mean of the tasks that are not held out may not be worse than the live version"),
        ("mean >= -1.5e3 - .5", "the mean of the tasks that are not held out must score -1500 less 0.5 or better"),
        (" own  >= live + 0.02 ", "the expert's own task must gain at least 0.02 against the live version"),
        ('"sort, by age" >= 0.7 + 1 se', 'the task "sort, by age" must score 0.7 plus 1 standard error or better'),
    ],
)
def test_a_rule_says_what_it_means(text: str, meaning: str) -> None:
    assert parse(text).meaning() == parse(f"{text} else hold").meaning() == f"{meaning}; else the version is held"
    assert parse(f"{text} else reject").meaning() == f"{meaning}; else the expert is rejected"
    assert parse(parse(text).text) == parse(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it ends, where each, mean, own or a task in double quotes should be"),
        ("every >= live", "at letter 1 stands `every >= live`, where each, mean, own"),
        ("sort >= 0.7", "at letter 1 stands `sort >= 0.7`, where each, mean, own or a task in double quotes"),
        ('"" >= 0.7', 'at letter 1 stands `"" >= 0.7`'),
        ("each > live", "at letter 6 stands `> live`, where `>=` should be"),
        ("each <= live", "at letter 6 stands `<= live`"),
        ("each >= main/3", "at letter 9 stands `main/3`, where live, base, expert or a number should be"),
        ("each >= lively", "at letter 9 stands `lively`"),
        ("each >= 0.5.2", "at letter 9 stands `0.5.2`"),
        ("each >= nan", "at letter 9 stands `nan`"),
        ("each >= live -", "it ends, where a number should be"),
        ("each >= live - - 1", "at letter 16 stands `- 1`, where a number should be"),
        ("each >= live - 0.02 sigma", "at letter 21 stands `sigma`, where `else` or its end should be"),
        ("each >= live 0.02", "at letter 14 stands `0.02`, where `+`, `-`, `else` or its end should be"),
        ("each >= live else drop", "at letter 19 stands `drop`, where hold or reject should be"),
        ("each >= live else hold it", "at letter 24 stands `it`"),
    ],
)
def test_what_is_no_rule_is_told_where_and_what_one_is(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) as refused:
        parse(text)
    assert f"the rule `{text}`" in str(refused.value) and GRAMMAR in str(refused.value)
    example = str(refused.value).split("`")[-2]
    assert parse(example).meaning()


@pytest.mark.parametrize("text", ["each >= 1e999", "each >= live - 1e999", "each >= live\n", "each >= 1" + "0" * 500])
def test_what_cannot_be_counted_or_shown_is_no_rule(text: str) -> None:
    with pytest.raises(ValueError, match=r"too large|no printable line"):
        parse(text)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('require = ["each > live"]', "evaluate.require: the rule `each > live`: at letter 6"),
        ('command = ["python", "score.py"]', "no argument has {folder} in it"),
        ('command = ["", "{folder}"]', "its first word is the program"),
        ('command = ["a\\u0000", "{folder}"]', "no word has a NUL in it"),
        ('environment = {"A=B" = "c"}', "has no `=` in it"),
        ('environment = {"A" = "\\u0000"}', "nothing has a NUL in it"),
        ("timeout_seconds = 0", "evaluate.timeout_seconds"),
        ('on_error = "reject"', "evaluate.on_error"),
    ],
)
def test_the_settings_of_the_evaluator_are_checked_when_they_are_read(tmp_path: Path, lines: str, said: str) -> None:
    path = tmp_path / "mainstem.toml"
    path.write_text(f"[evaluate]\n{lines}\n")
    with pytest.raises(BadConfig, match=re.escape(said)) as refused:
        load(path)
    assert str(path) in str(refused.value) and "evaluate." in refused.value.hint
