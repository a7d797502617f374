"""`mainstem init`: make a home."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.common import HomeOption, named_home, settings_of
from daemon.errors import BadConfig
from daemon.layout import Home, is_head_name
from projector.text import shown, size

MOST_LETTERS = 200  # in a base's name


def command(
    base: Annotated[
        Path, typer.Option(help="The base: a Hugging Face folder or a .safetensors file.", show_default=False)
    ],
    at: Annotated[
        Path | None, typer.Argument(metavar="HOME", help="The folder to make, new or empty.", show_default=False)
    ] = None,
    home: HomeOption = None,
    name: Annotated[
        str | None,
        typer.Option(help="What the base is called: in cards, over HTTP, on the page. By default as its folder."),
    ] = None,
    method: Annotated[str, typer.Option(help="The method of the head `main`; see `mainstem methods`.")] = "opcm",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A parameter: KEY=VALUE for main, HEAD.KEY=VALUE for another head.", metavar="KEY=VALUE"
        ),
    ] = None,
    heads: Annotated[
        list[str] | None, typer.Option("--head", help="A further head over the same experts.", metavar="NAME=METHOD")
    ] = None,
) -> None:
    """Make a home: copy the base into it and publish it as version 0 of every head."""
    # imported here: these bring torch
    from daemon.home.founding import found
    from projector.methods import make

    chosen = {"main": method, **heads_of(heads or [])}
    params = params_of(settings or [], chosen)
    made = [(head, make(method, params[head])) for head, method in chosen.items()]
    folder = named_home(at, home)
    if folder is None:
        raise typer.BadParameter("name the folder to make", param_hint="HOME")
    if name is not None and (not name.strip() or shown(name) != name or len(name) > MOST_LETTERS):
        raise BadConfig(f"--name {shown(name)}: no name", f"give 1 to {MOST_LETTERS} printable letters, as org/model")
    target = Home(folder.resolve())
    compute = settings_of(target).compute
    record = found(target, base, made, lambda step: typer.echo(f"{step} ...", err=True), compute, name=name)
    typer.echo(f"made {target.root}: base {record.name}, {record.parameters:,} parameters, {size(record.size_bytes)}")
    typer.echo(f"next: mainstem run --home {folder}    then drop experts into {folder / 'inbox'}")


def heads_of(words: Sequence[str]) -> dict[str, str]:
    """The methods of further heads by name, from NAME=METHOD. Raises BadConfig."""
    chosen: dict[str, str] = {}
    for word in words:
        name, given, method = word.partition("=")
        if not given or not is_head_name(name) or name in chosen or name == "main":
            raise BadConfig(
                f"--head {word}: expected NAME=METHOD with a new name of letters, digits and underscores",
                "for example --head init=ema; the method of main is given by --method",
            )
        chosen[name] = method
    return chosen


def params_of(words: Sequence[str], heads: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Every head's parameters, from KEY=VALUE for main and HEAD.KEY=VALUE for any. Raises BadConfig."""
    params: dict[str, dict[str, str]] = {name: {} for name in heads}
    for word in words:
        key, given, value = word.partition("=")
        head, dotted, parameter = key.rpartition(".")
        head = head if dotted else "main"
        if not given or not parameter or head not in heads:
            raise BadConfig(f"--set {word}: expected KEY=VALUE or HEAD.KEY=VALUE", f"the heads are {', '.join(heads)}")
        if parameter in params[head]:
            raise BadConfig(f"--set {word}: {head}.{parameter} is given twice", "give it once")
        params[head][parameter] = value
    return params
