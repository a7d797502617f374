"""`mainstem compare`: two versions side by side."""

from typing import Annotated

import typer

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, open_reader, print_json, print_table

VERSION_HELP = "HEAD/N, a head for its live version, or N of the first head."


def command(
    a: Annotated[str, typer.Argument(metavar="A", help=VERSION_HELP, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same for the other.", show_default=False)],
    at: HomeArgument = None,
    home: HomeOption = None,
    experts: Annotated[
        bool, typer.Option("--experts", help="Also what each keeps of every archived expert: reads them all.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare two versions: norms and cosine of their task vectors by layer group, and what they keep of the experts.

    A task vector is the merged model less the base. Kept is <expert, merged> / <expert, expert>: how far the merged
    task vector goes along the expert's, 1 where it goes as far as the expert itself.
    """
    from daemon.reports.compare import compare, find_published

    where, reader = open_reader(at, home)
    with reader:
        found = compare(where, reader, find_published(reader, a), find_published(reader, b), experts=experts)
    if as_json:
        print_json(found)
        return
    first, second = found["a"], found["b"]
    print_table(
        ("group", "tensors", "parameters", f"norm {first}", f"norm {second}", "cosine"),
        (
            (one["group"], one["tensors"], f"{one['parameters']:,}", one["a_norm"], one["b_norm"], one["cosine"])
            for one in (*found["groups"], {"group": "total", **found["total"]})
        ),
    )
    if experts:
        typer.echo()
        print_table(
            ("id", "version", "norm", f"kept {first}", f"kept {second}", f"cosine {first}", f"cosine {second}", "name"),
            (
                (e["id"], e["version"], e["norm"], e["a_kept"], e["b_kept"], e["a_cosine"], e["b_cosine"], e["name"])
                for e in found["experts"]
            ),
        )
