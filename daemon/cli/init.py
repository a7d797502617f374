"""`mainstem init`: make a home."""

from collections.abc import Collection, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.common import HomeOption, named_home, settings_of
from daemon.errors import BadConfig
from daemon.home.presets import PRESETS
from daemon.layout import Home, is_head_name
from projector.text import shown, size

if TYPE_CHECKING:
    from projector.method import Method

DEFAULT_METHOD = "opcm"  # of main
MOST_LETTERS = 200  # in a base's name
PresetName = StrEnum("PresetName", {name: name for name in PRESETS})  # type: ignore[misc]  # names known at run time


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
    preset: Annotated[
        PresetName | None,
        typer.Option(help="A set of heads that has a name; see docs/time.md. The others go before it."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help=f"The method of the head `main`, by default {DEFAULT_METHOD}; see `mainstem methods`.",
            show_default=False,
        ),
    ] = None,
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

    made = list(heads_chosen(preset, method, heads or [], settings or []).items())
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


def heads_chosen(
    preset: str | None, method: str | None, heads: Sequence[str], settings: Sequence[str]
) -> dict[str, "Method"]:
    """The heads of a new home by name: those of the preset, and those that are given (NAME=METHOD, the method of main),
    with the parameters that are given (KEY=VALUE). A head that is given has nothing of the preset's. Raises BadConfig.
    """
    from projector.methods import make

    planned = dict(PRESETS[preset].heads) if preset else {}
    given = {**({"main": method} if method else {}), **heads_of(heads)}
    planned = {"main": (DEFAULT_METHOD, {}), **planned, **{name: (named, {}) for name, named in given.items()}}
    params = params_of(settings, planned)
    return {name: make(named, {**some, **params[name]}) for name, (named, some) in planned.items()}


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


def params_of(words: Sequence[str], heads: Collection[str]) -> dict[str, dict[str, str]]:
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
