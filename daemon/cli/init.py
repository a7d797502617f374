"""`mainstem init`: make a home."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.common import settings_of, size
from daemon.errors import BadConfig
from daemon.home import Home, is_head_name


def command(
    home: Annotated[Path, typer.Argument(help="The folder to make, new or empty.", show_default=False)],
    base: Annotated[
        Path, typer.Option(help="The base: a Hugging Face folder or a .safetensors file.", show_default=False)
    ],
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
    from daemon.founding import found
    from projector.methods import make

    chosen = {"main": method, **heads_of(heads or [])}
    params = params_of(settings or [], chosen)
    made = [(name, make(method, params[name])) for name, method in chosen.items()]
    target = Home(home.resolve())
    compute = settings_of(target).compute
    record = found(target, base, made, lambda step: typer.echo(f"{step} ...", err=True), compute)
    typer.echo(f"made {target.root}: base {record.name}, {record.parameters:,} parameters, {size(record.size_bytes)}")
    typer.echo(f"next: mainstem run --home {home}    then drop experts into {home / 'inbox'}")


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
