"""`mainstem pull`: a version, or an expert's view of it, into a folder."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from daemon.cli.common import size
from daemon.pulling import Report, pull


def command(
    url: Annotated[str, typer.Argument(help="Where a mainstem serves: http://HOST:PORT", show_default=False)],
    dest: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    head: Annotated[str, typer.Option(help="The head to fetch from.")] = "main",
    version: Annotated[str, typer.Option(help="A version's number, or latest.")] = "latest",
    view: Annotated[
        str | None,
        typer.Option(metavar="EXPERT", help="That expert's own model out of an emr head: its sha256 or id."),
    ] = None,
) -> None:
    """Fetch a version into the new folder DEST and check every file; all of it arrives, or nothing."""
    with _bar() as report:
        pulled = pull(url, dest, head, version, view, report)
    what = f"{pulled.head} version {pulled.version}" + (f", the view of {view}" if view else "")
    typer.echo(f"{what}: {pulled.files} files, {size(pulled.size_bytes)} in {dest}")


@contextmanager
def _bar() -> Iterator[Report | None]:
    """A progress bar for each file, on a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        yield report
