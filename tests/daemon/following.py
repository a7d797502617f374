"""Does what a hint says, as a person would who pastes the command in it into a shell."""

import re
import shlex
import subprocess

from typer.testing import CliRunner

from daemon.cli.app import app

COMMAND = re.compile(r"`((?:mainstem (?:convert|rebuild|quarantine retry)|cp|mv|chmod) [^`]+)`")


def commands_in(hint: str) -> list[str]:
    """The commands in a hint, in their order: what stands between backquotes is what a person pastes."""
    found = COMMAND.findall(hint)
    assert found, hint
    return found


def command_in(hint: str) -> list[str]:
    """The words of the first command in a hint."""
    return shlex.split(commands_in(hint)[0])


def run(command: str) -> None:
    """Runs a command."""
    if not command.startswith("mainstem "):
        subprocess.run(command, shell=True, check=True)
        return
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0, done.output


def follow(hint: str | None) -> None:
    """Runs the first command in a hint."""
    run(commands_in(hint or "")[0])
