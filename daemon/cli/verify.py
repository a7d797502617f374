"""`mainstem verify`: re-hash everything."""

import typer

from daemon.cli.common import HomeOption, JsonOption, open_reader, print_json


def command(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Re-hash the base, every version and every archived expert against manifests and registry.

    Exit status 1 where anything differs; each difference is named.
    """
    from daemon.verification import verify

    where, reader = open_reader(home)
    with reader:
        checked, found = verify(
            where, reader, lambda what: None if as_json else typer.echo(f"checking {what}", err=True)
        )
    if as_json:
        print_json({"checked": checked, "problems": found})
    else:
        for problem in found:
            typer.echo(problem)
        typer.echo(f"{checked} things checked, {len(found) or 'no'} problem{'' if len(found) == 1 else 's'}")
    if found:
        raise typer.Exit(1)
