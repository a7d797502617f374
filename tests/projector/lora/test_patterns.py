"""Patterns for modules' names: the first that peft would take, found in a time that is known before."""

import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from projector.errors import BadSchema
from projector.lora import patterns
from projector.lora.patterns import Patterns

LETTERS = st.sampled_from(
    ["a", "b", "q_proj", ".", ".", r"\.", r"\d", r"\w", r"\W", r"\s", r"\-", r"\<", "[ab]", "[^.]", r"[\w.-]", r"[^\d]"]
)
REPEATS = st.sampled_from(["", "", "", "*", "+", "?", "*?", "{2}", "{1,3}", "{1,}", "{,2}"])
PIECES = st.one_of(
    st.tuples(LETTERS, REPEATS).map("".join),
    st.sampled_from(["(", "(?:", ")", ")?", "|", "^", "$", "7", "[a&&b]", "(?i)"]),
)
WRITTEN = st.one_of(
    st.lists(PIECES, min_size=1, max_size=6).map("".join),
    st.tuples(LETTERS, REPEATS, LETTERS, REPEATS).map(lambda p: f"({p[0]}{p[1]}|{p[2]}){p[3]}"),
    st.text("ab.^$", min_size=1, max_size=4),
)
NAMES = st.one_of(
    st.text("ab.7_- <", min_size=1, max_size=8), st.sampled_from(["a.q_proj", "b.7.q_proj", "ab.a", "é.a"])
)


def place(written: list[str], name: str) -> float | None:
    """The place of the first pattern that matches; None where they are refused."""
    try:
        return Patterns({pattern: at for at, pattern in enumerate(written)}).first(name, -1)
    except BadSchema:
        return None


@given(st.lists(WRITTEN, min_size=1, max_size=5, unique=True), NAMES)
@example(["a.b", "a..b"], "a-b")
@example(["^b", "b$", "^a.b$"], "a.b")
@example(["b.a", "a"], "b-a")
@example([r"^a\.b", "a.b"], "a-b")
@example(["^a|b"], "c.b")
@example(["(b|a$)"], "x.a")
def test_what_is_taken_is_what_peft_takes(written: list[str], name: str) -> None:
    found = place(written, name)
    if found is not None:
        key = get_pattern_key(written, name)
        assert found == (written.index(key) if re.match(rf"(.*\.)?({key})$", name) and key in written else -1)


@pytest.mark.parametrize(
    "pattern",
    [
        "q_proj",
        "^model.layers.1.mlp.q_proj$",
        r"layers\.(0|1|2)\.(?:mlp|self_attn)\.(q|k)_proj",
        r"layers\.\d{1,2}\..*_proj",
        r".*layers\.[0-9]+\.(mlp|attn)\.[a-z]+_(proj|up)",
        "[^.]+.mlp.[a-z_]+?",
        "(model.)?layers.1.mlp.q_proj",
        ".*.*.*q_proj",
    ],
)
def test_the_patterns_that_people_write(pattern: str) -> None:
    assert Patterns({pattern: 2}).first("model.layers.1.mlp.q_proj", 1) == 2
    assert Patterns({pattern: 2}).first("model.layers.1.norm", 1) == 1


UNKNOWN = {
    "repeated groups": ["(a+)+b", "(?:a|b){9}", r"(a+|\\)*b", "(.*)*x"],
    "what another engine has not": ["(?x:(a+) *b)", r"(a+)(?:\1)+", "(?=a+)b", "(?i)a", "a{2}+", "a*+", r"\bq"],
    "what another engine reads otherwise": ["a{,3}", "[a&&b]+", "[[:alpha:]]", r"\Aq"],
    "no regular expressions": ["(unclosed", "a)", "a{3,2}", "[b-a]", "*"],
    "too long": ["x" * 301, "a{999}" * 5],
}


@pytest.mark.parametrize("pattern", [pattern for kind in UNKNOWN.values() for pattern in kind])
def test_a_pattern_that_is_not_understood_for_sure_is_refused(pattern: str) -> None:
    with pytest.raises(BadSchema, match="pattern") as caught:
        Patterns({pattern: 2})
    assert "names" in caught.value.hint


HOSTILE = """
import resource, sys
from projector.errors import BadSchema
from projector.lora.patterns import Patterns
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
for pattern in ("a*a*a*b", "a?" * 30 + "a" * 30 + "b", "(a|a)(a|a)(a|aa)[ab]*a*a*c", ".*.*.*.*.*=.*"):
    print(Patterns({pattern: 2}).first("a" * 4000, 1))
many = {f"[ab]*a[ab]{{50}}b{i}x*": 2 for i in range(200)}
names = [f"{'ab' * 2000}{i}" for i in range(10_000)]
for patterns in ({"." * i + "a": 2 for i in range(1, 300)}, many):
    try:
        held = Patterns(patterns)
        print([held.first(name, 1) for name in names][-1])
    except BadSchema as error:
        print("refused" if "for ever" in str(error) else error)
"""


def test_hostile_patterns_take_seconds() -> None:
    done = subprocess.run([sys.executable, "-c", HOSTILE], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout.split(), done.stderr) == (["1"] * 4 + ["1", "refused"], "")


@pytest.mark.parametrize("name", ["a\nb", "x" * 5000, "é"])
def test_a_name_that_no_pattern_can_be_held_against_is_refused(name: str) -> None:
    assert Patterns({}).first(name, 3) == 3
    with pytest.raises(BadSchema, match="no module's name"):
        Patterns({"[ab]": 2}).first(name, 1)


def test_more_patterns_than_anyone_writes_are_refused() -> None:
    for many in (
        {f"q{i}": 1 for i in range(5000)},
        {f"q{i}+": 1 for i in range(300)},
        {f"a{{999}}{i}": 1 for i in range(20)},
    ):
        with pytest.raises(BadSchema, match="patterns"):
            Patterns(many)


def test_names_are_looked_up_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """As EVA writes them: a rank for each module by its whole name."""
    monkeypatch.setattr(patterns, "MAX_STEPS", 0)
    names = [f"model.layers.{i // 100}.mlp.experts.{i % 100}.up_proj" for i in range(4096)]
    held = Patterns({name: place for place, name in enumerate(names)})
    assert [held.first(f"base.{name}", -1) for name in names] == list(range(4096))
