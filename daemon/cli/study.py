"""`mainstem study`: methods tried on one's own experts, before one of them is chosen."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.common import JsonOption, print_json, print_table

if TYPE_CHECKING:
    from daemon.study.results import Results
    from daemon.study.studying import Study

COMPARED = 32  # experts, in the report


def command(
    base: Annotated[Path, typer.Option(help="The base: a Hugging Face folder or a .safetensors file.")],
    experts: Annotated[Path, typer.Option(help="A folder with the experts: folders, or .safetensors files.")],
    evaluate: Annotated[
        str,
        typer.Option(help="What scores the model in {folder}, as [evaluate] command does.", metavar="COMMAND"),
    ],
    methods: Annotated[
        str | None, typer.Option(help="Methods, with commas; by default all. See `mainstem methods`.", metavar="A,B")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Values of a parameter, each of which is tried.", metavar="METHOD.KEY=V1,V2"),
    ] = None,
    orders: Annotated[int, typer.Option(help="In how many orders the experts arrive.", min=1, max=1000)] = 10,
    seed: Annotated[int, typer.Option(help="By which the orders are shuffled.")] = 0,
    out: Annotated[Path, typer.Option(help="The folder of the study, new, or one to go on with.")] = Path("study"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only time the first cells, and say what all would take.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Try methods and parameters on the same experts in several orders, score every version, and recommend one.

    It may be stopped at any time: the same command goes on. It ends in a table, OUT/study.json and OUT/report.html,
    for which it needs `pip install 'mainstem[report]'`. OUT/mainstem.toml may have settings.
    """
    from daemon.compute.progress import Abandoned
    from daemon.config import load
    from daemon.logs import configure
    from daemon.reports.report import charts
    from daemon.study import planning
    from daemon.study.studying import Console
    from daemon.study.studying import Study as Studying

    class Lines(Console):
        def say(self, text: str) -> None:
            typer.echo(text, err=True)

    charts.require()
    folder = out.absolute()
    settled = load(Studying.config(folder))
    configure(settled.log.model_copy(update={"level": "warning"}))
    command = planning.command(evaluate, settled.evaluate)
    names = [name.strip() for name in methods.split(",")] if methods else []
    plan = planning.plan(base, experts, command, names, settings or [], orders, seed, settled.admission)
    with _stopping() as stopping:
        study = Studying(plan, folder, settled, Lines(), stopping)
        typer.echo(study.outlined(), err=True)
        try:
            if dry_run:
                typer.echo(study.estimate())
                return
            found = study.run()
        except Abandoned:
            typer.echo("stopped: the same command goes on where it was", err=True)
            raise typer.Exit(1) from None
    _write(study, found, folder)
    if as_json:
        print_json(found.described())
    else:
        _print(found, folder)


def _write(study: "Study", found: "Results", out: Path) -> None:
    import json

    from daemon.reports.report.document import render
    from daemon.reports.report.overlaps import overlap
    from daemon.study.telling import report, section

    home, reader = study.first()
    with reader:
        cosines = overlap(home, reader, COMPARED)
    page = render(report(found, cosines), more=[section(found)])
    (out / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    (out / "study.json").write_text(json.dumps(found.described(), indent=2) + "\n")


def _print(found: "Results", out: Path) -> None:
    from daemon.study.telling import MERIT, PRICE, conclusion, merit, price

    print_table(MERIT, merit(found))
    typer.echo("")
    print_table(PRICE, price(found))
    typer.echo("")
    for one in found.left_out:
        typer.echo(f"left out: {one.label}: {one.why}; {one.hint}")
    typer.echo("\n".join([*conclusion(found), "", f"wrote {out / 'report.html'} and {out / 'study.json'}"]))


@contextmanager
def _stopping() -> Iterator[Event]:
    """Set by SIGTERM and Ctrl-C: an evaluator that runs is ended, and what is finished stays."""
    stop = Event()

    def heard(*_: object) -> None:
        stop.set()

    before = {number: signal.signal(number, heard) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
