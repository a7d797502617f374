"""The runbook has every alert and every reason, no other, and what it says to type can be typed."""

import re
import shlex
from pathlib import Path

import typer
import yaml

from daemon.cli.app import app
from daemon.metrics import OTHER, REASONS, TROUBLES

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/runbook.md").read_text()
RULES = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule}


def part(title: str) -> str:
    """What stands below a heading, until one of the same rank or a higher one."""
    found = re.search(rf"^(#+) {title}\n(.*?)(?=^#{{1,2}} |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[2] if found[1] == "##" else found[2].partition("\n### ")[0]


def first_words(text: str) -> set[str]:
    """The words that begin the rows of a table."""
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


def test_it_has_every_alert_and_no_other() -> None:
    assert re.findall(r"^### (\w+)$", PAGE, re.MULTILINE) == sorted(ALERTS, key=lambda name: PAGE.find(f"### {name}\n"))
    for name, rule in ALERTS.items():
        link, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (link, anchor) == ("docs/runbook.md", name.lower())
        assert (f"### {name}\n" in part("Pages")) == (rule["labels"]["severity"] == "page")


def test_each_entry_is_short_and_says_what_to_type_or_where_to_read_on() -> None:
    for name in ALERTS:
        said = part(name)
        assert "`" in said or "](" in said, name
        assert len([line for line in said.splitlines() if line and not line.startswith("|")]) <= 5, name


def test_it_has_every_reason_to_refuse_and_every_trouble() -> None:
    assert first_words(part("Reasons")) == set(REASONS)
    assert first_words(part("MainstemTrouble")) == {*TROUBLES, OTHER}


def test_the_troubles_are_those_of_readyz() -> None:
    readiness = (ROOT / "docs/http.md").read_text().partition("## Readiness\n")[2].partition("\n## ")[0]
    assert first_words(readiness) == set(TROUBLES)


def test_every_command_that_it_names_is_there() -> None:
    every = typer.main.get_command(app)
    commands = [shlex.split(text) for text in re.findall(r"`mainstem ([^`]+)`", PAGE)]
    assert len(commands) > 20
    for words in commands:
        command, left = every, list(words)
        while groups := getattr(command, "commands", None):
            assert left[0] in groups, words
            command = groups[left.pop(0)]
        options = {name for one in command.params for name in one.opts}
        assert {word for word in left if word.startswith("--")} <= options, words
