"""`mainstem report`: a home as one page."""

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, open_reader, print_json


def command(
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.html", help="The file to write; may be left out with --json.", show_default=False),
    ] = None,
    at: HomeArgument = None,
    home: HomeOption = None,
    last: Annotated[int, typer.Option(help="How many versions of each head are looked at, the newest.", min=1)] = 1000,
    overlap: Annotated[
        int,
        typer.Option(
            help="How many of the newest experts are compared; 0 reads nothing of the archive.", min=0, max=100
        ),
    ] = 32,
    as_json: JsonOption = False,
) -> None:
    """Write a report of a home as one HTML file: scores, the field's figures, norms, overlap, costs, verdicts.

    Nothing in it is loaded from elsewhere. Needs `pip install 'mainstem[report]'`, but for --json.
    """
    from datetime import UTC, datetime

    from daemon.reports.report.gathering import gather
    from daemon.reports.report.overlaps import overlap as measured

    if out is None and not as_json:
        raise typer.BadParameter("name the file to write, or give --json", param_hint="OUT.html")
    if out is not None:
        if out.is_dir():
            raise typer.BadParameter(f"{out} is a folder: name a file, then the home", param_hint="OUT.html")
        if not out.absolute().parent.is_dir():
            folder = shlex.quote(str(out.parent))
            raise typer.BadParameter(
                f"there is no folder {out.parent}: `mkdir -p {folder}` first", param_hint="OUT.html"
            )
        from daemon.reports.report import charts

        charts.require()
    where, reader = open_reader(at, home)
    with reader, _bar() as show:
        overlaps = measured(where, reader, overlap, report=show) if overlap > 1 else None
        found = gather(reader, datetime.now(UTC), overlaps, window=last)
    if out is not None:
        from daemon.reports.report.document import render

        out.write_text(render(found), encoding="utf-8", errors="backslashreplace")
        if not as_json:
            typer.echo(f"wrote {out}: open it in a browser")
    if as_json:
        print_json(found)


@contextmanager
def _bar() -> Iterator[Callable[[float], None]]:
    """A bar on a terminal while experts are read."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing the newest experts", total=1.0)
        yield lambda share: progress.update(task, completed=share)
