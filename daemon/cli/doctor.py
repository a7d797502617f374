"""`mainstem doctor`: what could keep a home from working on this machine."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, named_home, print_json


def command(
    at: HomeArgument = None,
    home: HomeOption = None,
    base: Annotated[
        Path | None, typer.Option(help="The model to make a home with, where none is there: what arrivals would take.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look at limits, file system, space, owners, clock, torch, registry and states, and say what to do.

    Works on a folder without a home, too. Exit status 1 where something is bad.
    """
    from daemon.doctor.examining import examine
    from daemon.doctor.finding import Level

    folder = (named_home(at, home) or Path.cwd()).resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    findings = []
    for finding in examine(there, base):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{finding.level:<5} {finding.check:<16} {finding.text}")
            if finding.hint:
                typer.echo(f"{'':<22} hint: {finding.hint}")
    wrong = any(finding.level is Level.BAD for finding in findings)
    if as_json:
        print_json({"folder": str(there), "good": not wrong, "findings": [asdict(finding) for finding in findings]})
    if wrong:
        raise typer.Exit(1)
