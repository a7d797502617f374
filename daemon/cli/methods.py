"""`mainstem methods`: what can be chosen."""

from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.common import JsonOption, print_json
from daemon.home.presets import DEFAULT_METHOD

if TYPE_CHECKING:
    from projector.laws.listing import Listing


def command(
    name: Annotated[str | None, typer.Argument(help="Only this method.", show_default=False)] = None,
    as_json: JsonOption = False,
) -> None:
    """List the merging methods: formula, paper, parameters, what they keep, what they need of an expert."""
    # imported here: these bring torch
    from projector.laws.listing import listing
    from projector.methods import make, methods

    chosen = methods().values() if name is None else [type(make(name))]
    listed = [listing(cls) for cls in chosen]
    if as_json:
        print_json(listed[0] if name else listed)
        return
    for one in listed:
        _print(one)


def _print(one: "Listing") -> None:
    from projector.laws.listing import lines
    from projector.method import worded

    default = " (the default)" if one.name == DEFAULT_METHOD else ""
    typer.echo(f"{one.name}{default}\n    {one.summary}\n    {one.formula}\n    {one.paper}")
    for what, words in lines(one):
        typer.echo(f"    {what}: {words}")
    for key, about in one.parameters.items():
        allowed = f" ({about.range})" if about.range else ""
        typer.echo(f"    {key} = {worded(about.default)}: {about.help}{allowed}")
    typer.echo()
