"""`mainstem zipit`: whole models zipped by their features, with calibration data."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.common import JsonOption, print_json, print_table
from daemon.cli.interrupting import ANEW, ending_with

if TYPE_CHECKING:
    from projector.zipping.graph import Graph


def command(
    models: Annotated[
        list[Path],
        typer.Argument(help="Whole models, two or more: folders, or .safetensors files.", show_default=False),
    ],
    calibration: Annotated[
        Path,
        typer.Option(
            help="Data: FILE.py with model(folder) and batches(); of a model that transformers knows also FILE.txt with"
            " texts, or FILE.safetensors with inputs.",
            metavar="FILE",
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="The folder to make.")] = None,
    to: Annotated[
        str | None,
        typer.Option(help="Zip up to this node; what lies behind stays each model's own head.", metavar="NODE"),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Let more than two features become one, their correlations times this; 0: never.")
    ] = 0,
    beta: Annotated[
        float, typer.Option(help="The share of merges that may lie within one model; 0 permutes one to the other.")
    ] = 1,
    graph: Annotated[
        Path | None, typer.Option(help="The model's graph as JSON, where it is none that is known.", metavar="FILE")
    ] = None,
    show_graph: Annotated[
        bool, typer.Option("--show-graph", help="Only print the first model's graph, to look at or to change.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Zip models by their features on calibration data (ZipIt!), experts of one base or of different initialisation.

    It needs data and the model's graph, so it is no head's method. With --to the result has a head for each model.
    """
    from daemon.zipit.zipping import How, graph_of, zipit

    if show_graph:
        typer.echo(json.dumps(graph_of(models[0], calibration).described(), indent=2))
        return
    if out is None:
        raise typer.BadParameter("name the folder to make", param_hint="--out")
    own = _read_graph(graph) if graph else None
    with ending_with(ANEW, out):
        done = zipit(models, calibration, out, How(alpha, beta, to), own, lambda line: typer.echo(line, err=True))
    if as_json:
        print_json(done)
        return
    columns = ("step", "node", "features", "rows", "across", "within", "alone", "correlation", "dead")
    print_table(columns, ([getattr(met, column) for column in columns] for met in done.nodes))
    for line in done.warnings:
        typer.echo(f"warning: {line}")
    from projector.text import size

    parts = f"{size(done.shared_bytes)} shared, {size(done.own_bytes)} of their own" if done.heads else ""
    typer.echo(f"wrote {done.out}{f': {parts}' if parts else ''}, in {done.seconds:.1f} s")


def _read_graph(path: Path) -> "Graph":
    from daemon.errors import Reason, Refused
    from projector.zipping.graph import parse_graph

    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(Reason.ZIPIT, f"{path} is no JSON: {error}", "docs/zipit.md has the form of a graph") from error
    return parse_graph(value)
