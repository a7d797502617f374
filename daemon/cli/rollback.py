"""`mainstem rollback`: an older version is live again."""

from typing import Annotated

import typer

from daemon.cli.asking import DryRunOption, HeadOption, ReasonOption, VersionArgument, intervene, version_named
from daemon.cli.common import HomeOption, JsonOption, open_reader
from registry.records import Deed


def command(
    version: VersionArgument,
    head: HeadOption = None,
    withdraw: Annotated[
        bool,
        typer.Option("--withdraw", help="Also take every later expert out, of all heads, and block it."),
    ] = False,
    reason: ReasonOption = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an older version live again, at once, also while the daemon runs. What is merged later is held until
    `mainstem promote`; with --withdraw the later experts are gone, and merging goes on without them.
    """
    if not withdraw:
        intervene(Deed.ROLLBACK, home, reason, dry_run, version=version, head=head, as_json=as_json)
        return
    if as_json:
        raise typer.BadParameter("not with --withdraw, which tells how far it is", param_hint="--json")
    from daemon.cli.rebuild import console, take_out
    from daemon.errors import BadHome
    from daemon.notation import called

    where, reader = open_reader(None, home)
    with reader:
        meant = version_named(reader, version, head)
        later = [expert.id for expert in reader.lineage(after=meant.number)]
        of = reader.head(meant.head)
    if not later:
        name, newest = called(meant.head, meant.number), called(meant.head, of.newest if of else meant.number)
        raise BadHome(
            f"no expert that is merged came after {name}",
            f"`mainstem rollback {name}` makes it live again, `mainstem promote {newest}` the newest",
        )
    with console() as to:
        take_out(where, [str(number) for number in later], to, reason=reason, after=meant.number, dry=dry_run)
