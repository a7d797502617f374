"""`mainstem config show|check`: the settings in force, and the heads."""

from typing import TYPE_CHECKING

import typer

from daemon.cli.common import (
    HomeArgument,
    HomeOption,
    JsonOption,
    complain,
    find_home,
    open_reader,
    print_json,
    print_table,
    settings_of,
)
from daemon.layout import Home

if TYPE_CHECKING:
    from registry.records import Head

app = typer.Typer(help="The settings in force, and the heads.", no_args_is_help=True)


@app.command()
def show(at: HomeArgument = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print every setting with its value, defaults, mainstem.toml and the environment taken together; and the heads."""
    from daemon.config import meaning

    where = find_home(at, home)
    values, heads = settings_of(where).flat(), _heads(where)
    if as_json:
        print_json({**values, "heads": heads and [_described(head) for head in heads]})
        return
    print_table(
        ("setting", "value", "default", "meaning"),
        ((n, str(value).lower() if isinstance(value, bool) else value, *meaning(n)) for n, value in values.items()),
    )
    if heads:
        typer.echo()
        print_table(
            ("head", "method", "relative to", "parameters"),
            ((head.name, head.method, head.relative_to, _words(head)) for head in heads),
        )


def _heads(home: Home) -> list["Head"] | None:
    """The home's heads; None where its registry cannot be read now, which the settings have nothing to do with."""
    from registry.errors import RegistryError
    from registry.reader import Reader

    try:
        with Reader.open(home.registry) as reader:
            return reader.heads()
    except RegistryError as error:
        complain(str(error), error.hint)
        return None


def _described(head: "Head") -> dict[str, object]:
    return {"name": head.name, "method": head.method, "params": head.params, "relative_to": head.relative_to}


def _words(head: "Head") -> str:
    """A head's parameters as `--set` takes them."""
    return " ".join(f"{key}={_word(value)}" for key, value in head.params.items()) or "-"


def _word(value: object) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


@app.command()
def check(at: HomeArgument = None, home: HomeOption = None) -> None:
    """Check mainstem.toml and the environment; exit status 1 and the reason where they are wrong."""
    from daemon.arrivals.uploads import write_token
    from daemon.compute import commands
    from daemon.config import strangers
    from daemon.evaluation.evaluator import check_program
    from daemon.home.named_heads import check_heads
    from daemon.home.presets import INIT, growing
    from registry.records import RelativeTo

    where, reader = open_reader(at, home)
    with reader:
        settings = settings_of(where)
        if missing := check_heads(settings, [head.name for head in reader.heads()]):
            complain(*missing)
        if start := reader.head(INIT):
            from projector.methods import make  # it brings torch

            relative = start.relative_to is RelativeTo.TRAINED_FROM
            if found := growing(INIT, make(start.method, start.params), relative):
                complain(*found)
        write_token(where, settings.http)
        for webhook in settings.webhooks:
            webhook.secrets(where.root)
        if settings.evaluate.command:
            check_program(settings.evaluate, where.root)
        for command in settings.hooks.published:
            commands.check_program("hooks.published", command[0], where.root)
        if settings.compute.device.startswith("cuda"):
            from daemon.compute.resources import cuda_device  # it brings torch

            cuda_device(settings.compute.device)
    if unknown := strangers():
        complain(f"{', '.join(unknown)} in the environment: no setting is called so", "docs/settings.md has them all")
    for rule in settings.evaluate.rules:
        typer.echo(f"{rule.text}: {rule.meaning()}")
    typer.echo(f"{where.config} is fine")
