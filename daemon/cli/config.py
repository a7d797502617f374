"""`mainstem config show|check`: the settings in force."""

import typer

from daemon.cli.common import HomeOption, JsonOption, find_home, print_json, print_table, settings_of
from daemon.config import described

app = typer.Typer(help="The settings in force.", no_args_is_help=True)


@app.command()
def show(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Print every setting with its value: defaults, mainstem.toml and the environment taken together."""
    values = settings_of(find_home(home)).flat()
    if as_json:
        print_json(values)
        return
    print_table(
        ("setting", "value", "default", "meaning"),
        (
            (n, str(values[n]).lower() if isinstance(values[n], bool) else values[n], default, text)
            for n, default, text in described()
        ),
    )


@app.command()
def check(home: HomeOption = None) -> None:
    """Check mainstem.toml and the environment; exit status 1 and the reason where they are wrong."""
    where = find_home(home)
    settings_of(where)
    typer.echo(f"{where.config} is fine")
