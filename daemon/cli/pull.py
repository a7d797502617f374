"""`mainstem pull`: a version, or an expert's view of it, into a folder; with --watch each new one."""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from daemon.cli.common import JsonOption, complain, print_json
from daemon.errors import DaemonError
from daemon.notation import called, read_name
from daemon.pull.client import Passing
from daemon.pull.fetching import Report
from daemon.pull.pulling import CONNECTIONS, LATEST, Pulled, follow, pull
from projector.text import shown, size


def command(
    url: Annotated[str, typer.Argument(help="Where a mainstem serves: http://HOST:PORT", show_default=False)],
    dest: Annotated[
        Path, typer.Argument(help="The folder to make, or to replace if a pull made it.", show_default=False)
    ],
    head: Annotated[str | None, typer.Option(help="The head to fetch from: main, unless told otherwise.")] = None,
    version: Annotated[str, typer.Option(help="HEAD/N, a version's number, or latest.")] = LATEST,
    view: Annotated[
        str | None,
        typer.Option(metavar="EXPERT", help="That expert's own model out of an emr head: its sha256, name or id."),
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The version's LoRA adapter alone, into DEST/adapter.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep following: pull each new version.")] = False,
    connections: Annotated[int, typer.Option(min=1, max=64, help="How many pieces to fetch at a time.")] = CONNECTIONS,
    token: Annotated[
        str | None,
        typer.Option(envvar="MAINSTEM_TOKEN", help="Sent as a bearer token, for a proxy that wants one."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Fetch a version into the folder DEST and check every file; all of it arrives, or nothing."""
    if adapter and view is not None:
        raise typer.BadParameter("a view has no adapter: leave --view out", param_hint="--adapter")
    chosen, version = _named(head, version)
    if watch:
        if version != LATEST or view is not None:
            raise typer.BadParameter(
                "it follows the latest version: leave --version and --view out", param_hint="--watch"
            )
        _watch(url, dest, chosen, connections, as_json, adapter, token)
        return
    with _bar() as bar:
        pulled = pull(url, dest, chosen, version, view, bar, connections, adapter=adapter, token=token)
    if as_json:
        print_json({**asdict(pulled), "dest": str(dest)})
    else:
        typer.echo(_line(pulled, dest, view))


def _named(head: str | None, version: str) -> tuple[str, str]:
    """The head, and its version's number or LATEST."""
    named = read_name(version)
    if named is None:
        raise typer.BadParameter("give HEAD/N as main/12, a number, or latest", param_hint="--version")
    if head and named.head and named.head != head:
        raise typer.BadParameter(f"{version} is none of --head {head}", param_hint="--version")
    return head or named.head or "main", LATEST if named.number is None else str(named.number)


def _watch(url: str, dest: Path, head: str, connections: int, as_json: bool, adapter: bool, token: str | None) -> None:
    """One line for each version, until SIGTERM or Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    troubles = _Troubles(url)
    try:
        with (
            _bar() as bar,
            closing(
                follow(
                    url,
                    dest,
                    head,
                    bar,
                    troubles.told,
                    connections,
                    adapter=adapter,
                    token=token,
                    answered=troubles.over,
                )
            ) as versions,
        ):
            for pulled in versions:
                typer.echo(json.dumps({**asdict(pulled), "dest": str(dest)}) if as_json else _line(pulled, dest))
                sys.stdout.flush()
    except KeyboardInterrupt:
        typer.echo("stopped; what is in place stays", err=True)


class _Troubles:
    """Says once that the server is away, once of each thing that is damaged, and once that all is well again."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._told: set[str] = set()

    def told(self, error: DaemonError, _: float) -> None:
        what = "away" if isinstance(error, Passing) else str(error)
        if what not in self._told:
            complain(str(error), f"{error.hint}; it is tried again until it answers")
        self._told.add(what)

    def over(self) -> None:
        typer.echo(f"mainstem: {shown(self._url)} answers again", err=True)
        self._told.clear()


def _line(pulled: Pulled, dest: Path, view: str | None = None) -> str:
    what = called(pulled.head, pulled.version) + (f", the view of {view}" if view else "")
    if pulled.up_to_date:
        return f"{what} is in {dest} already: nothing to fetch"
    came = "" if pulled.fetched_bytes == pulled.size_bytes else f" ({size(pulled.fetched_bytes)} of it fetched)"
    return f"{what}: {pulled.files} files, {size(pulled.size_bytes)} in {dest}{came}"


@contextmanager
def _bar() -> Iterator[Report | None]:
    """A progress bar over all files, on a terminal; there while something is missing."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: list[TaskID] = []

        def report(done: int, total: int) -> None:
            if not tasks:
                tasks.append(progress.add_task("pull", total=total))
            progress.update(tasks[0], completed=done, total=total)
            if done == total:
                progress.remove_task(tasks.pop())

        yield report
