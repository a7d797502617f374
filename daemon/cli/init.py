"""`mainstem init`: make a home."""

import shutil
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from daemon.cli.common import HomeOption, complain, named_home, settings_of
from daemon.errors import BadConfig
from daemon.home.presets import DEFAULT_METHOD, LEANER, PRESETS, RELATIVE, growing
from daemon.layout import Home, is_head_name
from projector.text import shown, size

if TYPE_CHECKING:
    from daemon.config import Compute
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

    made = heads_chosen(preset, method, heads or [], settings or [])
    folder = named_home(at, home)
    if folder is None:
        raise typer.BadParameter("name the folder to make", param_hint="HOME")
    if name is not None and (not name.strip() or shown(name) != name or len(name) > MOST_LETTERS):
        raise BadConfig(f"--name {shown(name)}: no name", f"give 1 to {MOST_LETTERS} printable letters, as org/model")
    target = Home(folder.resolve())
    check_place(target)
    compute = settings_of(target).compute
    schemas: list[Schema] = []
    recommended = not preset and not method

    def seen(schema: "Schema") -> None:
        schemas.append(schema)
        if recommended:
            _check_default(schema, target.root, compute)

    record = found(
        target,
        base,
        list(made.methods.items()),
        lambda step: typer.echo(f"{step} ...", err=True),
        compute,
        name=name,
        relative=made.relative,
        seen=seen,
    )
    typer.echo(f"made {target.root}: base {record.name}, {record.parameters:,} parameters, {size(record.size_bytes)}")
    if recommended:
        typer.echo(_recommended(schemas[0]))
    for head, merges in made.methods.items():
        if head != "main" or not recommended:
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
        f"main merges by {DEFAULT_METHOD}, which kept most of real experts on weights alone (docs/quality.md); its"
        f" state takes {ours}\nleaner and faster, and published: --preset {LEANER}, whose state takes {leaner};\n"
        "`mainstem study` finds what is best for yours"
    )


def _check_default(schema: "Schema", folder: Path, compute: "Compute") -> None:
    """Raises BadConfig where this machine cannot merge by the default, with whether it can by the leaner one."""
    if unfit := _unfit(DEFAULT_METHOD, schema, folder, compute):
        if not _unfit(LEANER, schema, folder, compute):
            unfit.hint += f"; with --preset {LEANER} it fits"
        raise unfit


def _unfit(name: str, schema: "Schema", folder: Path, compute: "Compute") -> BadConfig | None:
    """Why a home in this folder could not merge by a method: too little memory, or disk."""
    from daemon.compute.resources import check_budget
    from projector.driver.steps import state_bytes
    from projector.methods import make

    method = make(name)
    try:
        check_budget(schema, [method], compute)
    except BadConfig as error:
        return error
    state = state_bytes(method, schema)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if 2 * state <= free:
        return None
    return BadConfig(
        f"{name} keeps {size(state)} and writes it anew with each arrival, and {folder} has {size(free)} free",
        "make room, or choose another disk",
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
    return chosen(planned, settings)


def chosen(heads: Mapping[str, tuple[str, Mapping[str, Any]]], settings: Sequence[str]) -> Chosen:
    """Heads of these methods and parameters, and what is given beside (KEY=VALUE). Complains of one that grows without
    end. Raises BadConfig."""
    from projector.methods import make
    from registry.records import RelativeTo

    params, relative = params_of(settings, heads), set()
    for name in heads:
        word = params[name].pop(RELATIVE, RelativeTo.BASE)
        if word not in list(RelativeTo):
            raise BadConfig(f"{name}.{RELATIVE} cannot be {word!r}", f"allowed: {', '.join(RelativeTo)}")
        if word == RelativeTo.TRAINED_FROM:
            relative.add(name)
    methods = {name: make(method, {**some, **params[name]}) for name, (method, some) in heads.items()}
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
