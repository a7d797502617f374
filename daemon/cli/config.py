"""`mainstem config show|check`: the settings in force."""

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

app = typer.Typer(help="The settings in force.", no_args_is_help=True)


@app.command()
def show(at: HomeArgument = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print every setting with its value: defaults, mainstem.toml and the environment taken together."""
    from daemon.config import meaning

    values = settings_of(find_home(at, home)).flat()
    if as_json:
        print_json(values)
        return
    print_table(
        ("setting", "value", "default", "meaning"),
        ((n, str(value).lower() if isinstance(value, bool) else value, *meaning(n)) for n, value in values.items()),
    )


@app.command()
def check(at: HomeArgument = None, home: HomeOption = None) -> None:
    """Check mainstem.toml and the environment; exit status 1 and the reason where they are wrong."""
    from daemon.arrivals.uploads import write_token
    from daemon.config import check_heads, strangers

    where, reader = open_reader(at, home)
    with reader:
        settings = settings_of(where)
        check_heads(settings, [head.name for head in reader.heads()])
        write_token(where, settings.http)
        if settings.compute.device.startswith("cuda"):
            from daemon.compute.resources import cuda_device  # it brings torch

            cuda_device(settings.compute.device)
    if unknown := strangers():
        complain(f"{', '.join(unknown)} in the environment: no setting is called so", "docs/settings.md has them all")
    for rule in settings.evaluate.rules:
        typer.echo(f"{rule.text}: {rule.meaning()}")
    typer.echo(f"{where.config} is fine")
