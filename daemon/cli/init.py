"""`mainstem init`: make a home."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from daemon.cli.common import HomeOption, complain, named_home, settings_of
from daemon.errors import BadConfig
from daemon.home.presets import DEFAULT_METHOD, LEANER, PRESETS, RELATIVE, growing
from daemon.layout import Home, is_head_name
from projector.errors import BadParameter
from projector.text import shown, size

if TYPE_CHECKING:
    from daemon.checkpoints.checkpoint import OpenCheckpoint
    from daemon.config import Settings
    from projector.method import Method
    from projector.spec import Schema

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
            "--set",
            help="A parameter: KEY=VALUE for main, HEAD.KEY=VALUE for another head; of any head: "
            "relative_to=trained_from, layer_alpha, layer_beta.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    heads: Annotated[
        list[str] | None, typer.Option("--head", help="A further head over the same experts.", metavar="NAME=METHOD")
    ] = None,
) -> None:
    """Make a home: copy the base into it and publish it as version 0 of every head."""
    # imported here: these bring torch
    from daemon.home.founding import check_place, found
    from projector.driver.steps import state_bytes
    from projector.methods import make

    made = heads_chosen(preset, method, heads or [], settings or [])
    folder = named_home(at, home)
    if folder is None:
        raise typer.BadParameter("name the folder to make", param_hint="HOME")
    if name is not None and (not name.strip() or shown(name) != name or len(name) > MOST_LETTERS):
        raise BadConfig(f"--name {shown(name)}: no name", f"give 1 to {MOST_LETTERS} printable letters, as org/model")
    target = Home(folder.resolve())
    check_place(target)
    in_force = settings_of(target)
    unnamed = not preset and not method and made.methods["main"] == make(DEFAULT_METHOD)
    schemas: list[Schema] = []

    def seen(checkpoint: "OpenCheckpoint") -> None:
        schemas.append(checkpoint.tensors.schema)
        if unnamed:
            _check_default(checkpoint, made, target.root, in_force)

    record = found(
        target,
        base,
        list(made.methods.items()),
        lambda step: typer.echo(f"{step} ...", err=True),
        in_force.compute,
        name=name,
        relative=made.relative,
        seen=seen,
    )
    typer.echo(f"made {target.root}: base {record.name}, {record.parameters:,} parameters, {size(record.size_bytes)}")
    if unnamed:
        typer.echo(_recommended(schemas[0]))
    for head, merges in made.methods.items():
        if head != "main" or not unnamed:
            typer.echo(f"{head} merges by {merges.name}; its state takes {size(state_bytes(merges, schemas[0]))}")
    typer.echo(
        f"next: mainstem run --home {quote(str(folder))}    then drop experts into {quote(str(folder / 'inbox'))}"
    )


def _recommended(schema: "Schema") -> str:
    """Why main merges as it does, what else there is, and what both keep over a base of these tensors."""
    from projector.driver.steps import state_bytes
    from projector.methods import make

    ours, leaner = (size(state_bytes(make(name), schema)) for name in (DEFAULT_METHOD, LEANER))
    return (
        f"main merges by {DEFAULT_METHOD}, which keeps most on weights alone (docs/quality.md); its state takes"
        f" {ours}\nwith --preset {LEANER} it merges faster and its state takes {leaner}; `mainstem study` finds"
        " what is best for your experts"
    )


def _check_default(checkpoint: "OpenCheckpoint", made: "Chosen", folder: Path, settings: "Settings") -> None:
    """Where nobody named a method for main: raises BadConfig where the memory does not do for it, and complains where
    the disk is small, with what it would be by the leaner method.
    """
    from daemon.arrivals.receiving import RESERVE_BYTES
    from daemon.compute.resources import check_budget
    from daemon.reports.sizing import sizing
    from projector.methods import make

    schema, heads = checkpoint.tensors.schema, list(made.methods.values())
    leaner = [make(LEANER) if name == "main" else method for name, method in made.methods.items()]
    origin = bool(made.relative)
    try:
        check_budget(schema, heads, settings.compute, origin=origin)
    except BadConfig as error:
        with suppress(BadConfig):
            check_budget(schema, leaner, settings.compute, origin=origin)
            error.hint += f"; with --preset {LEANER} it fits"
        raise
    need, least = (
        found.home_bytes + found.arrival_bytes + checkpoint.size_bytes + RESERVE_BYTES
        for found in (sizing(checkpoint, 0, methods, settings) for methods in (heads, leaner))
    )
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if need > free:
        complain(
            f"the home comes to need {size(need)}, and its archive on top, and {folder} has {size(free)} free",
            f"make room, or choose another disk; begun with --preset {LEANER} it needs {size(least)}",
        )


class Chosen(NamedTuple):
    """Heads by name, and those of them whose task vectors are taken against what an expert was trained from."""

    methods: "dict[str, Method]"
    relative: frozenset[str]


def heads_chosen(preset: str | None, method: str | None, heads: Sequence[str], settings: Sequence[str]) -> Chosen:
    """The heads of a new home: those of the preset, and those that are given (NAME=METHOD, the method of main), with
    the parameters that are given (KEY=VALUE). A head that is given has nothing of the preset's. Raises BadConfig.
    """
    planned = dict(PRESETS[preset].heads) if preset else {}
    given = {**({"main": method} if method else {}), **heads_of(heads)}
    planned = {"main": (DEFAULT_METHOD, {}), **planned, **{name: (named, {}) for name, named in given.items()}}
    try:
        return chosen(planned, settings)
    except BadParameter as error:
        if not preset and not method:
            error.hint += f"; main merges by {DEFAULT_METHOD} where no --method is named"
        raise


def chosen(heads: Mapping[str, tuple[str, Mapping[str, Any]]], settings: Sequence[str]) -> Chosen:
    """Heads of these methods and parameters (`relative_to` among them), and what is given beside (KEY=VALUE), which
    goes before those. Complains of one that grows without end. Raises BadConfig."""
    from projector.methods import make
    from registry.records import RelativeTo

    given, methods, relative = params_of(settings, heads), {}, set()
    for name, (method, some) in heads.items():
        params = {**some, **given[name]}
        word = params.pop(RELATIVE, RelativeTo.BASE)
        if word not in list(RelativeTo):
            raise BadConfig(f"{name}.{RELATIVE} cannot be {word!r}", f"allowed: {', '.join(RelativeTo)}")
        if word == RelativeTo.TRAINED_FROM:
            relative.add(name)
        methods[name] = make(method, params)
    for name, made in methods.items():
        if found := growing(name, made, name in relative):
            complain(*found)
    return Chosen(methods, frozenset(relative))


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
