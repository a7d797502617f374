"""Does what a hint says, as a person would who pastes the command in it into a shell."""

import re
import shlex
import subprocess

from typer.testing import CliRunner

from daemon.cli.app import app

COMMAND = re.compile(r"(mainstem convert|cp) ")
END = (";", ",", ")")


def command_in(hint: str) -> list[str]:
    """The words of the command in a hint."""
    found = COMMAND.search(hint)
    assert found, hint
    words = []
    for word in shlex.split(hint[found.start() :]):
        words.append(word.rstrip("".join(END)))
        if word.endswith(END):
            break
    at = words.index("(or") if "(or" in words else len(words)
    return words[:at]


def follow(hint: str | None) -> None:
    """Runs the command in a hint."""
    words = command_in(hint or "")
    if words[0] == "cp":
        subprocess.run(words, check=True)
        return
    done = CliRunner().invoke(app, words[1:])
    assert done.exit_code == 0, done.output
