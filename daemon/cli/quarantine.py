"""`mainstem quarantine`: the experts that were refused, and that somebody has still to look after."""

from dataclasses import asdict
from typing import Annotated

import typer

from daemon.cli.asking import expert_named, on_experts
from daemon.cli.common import HomeOption, JsonOption, local, open_reader, print_json, print_table
from daemon.layout import number
from projector.text import shown
from registry.records import Deed

app = typer.Typer(no_args_is_help=True, help="Look after experts that were refused.", rich_markup_mode=None)


@app.command("list")
def listing(
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=1_000_000)] = 100,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what is open: what was retried, discarded or merged since is not."""
    _, reader = open_reader(None, home)
    with reader:
        found = reader.quarantined(limit)
    if as_json:
        print_json([asdict(expert) for expert in found])
        return
    rows = ((e.id, local(e.finished_at), e.reason, shown(e.name), e.detail) for e in found)
    print_table(("id", "refused", "reason", "name", "why"), rows)
    if len(found) == limit:
        typer.echo(f"these are the newest {limit}: --limit N lists more")


@app.command()
def show(
    expert: Annotated[str, typer.Argument(metavar="ID", help="Its id, sha256 or name.", show_default=False)],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one: why it was refused, with which scores, and what to do."""
    where, reader = open_reader(None, home)
    with reader:
        found = expert_named(reader, expert, Deed.RETRY)
    folder = where.quarantine(found.id)
    files = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if as_json:
        print_json({**asdict(found), "folder": str(folder), "files": files})
        return
    typer.echo(f"{found.id}  {shown(found.name)}  {found.reason}\n    {found.detail}\n    hint: {found.hint}")
    for broken in (found.verdict or {}).get("broken", ()):
        typer.echo(f"    {broken['rule']}: {broken['why']}")
    typer.echo(f"    quarantine/{number(found.id)}/: {', '.join(map(shown, files)) or 'nothing'}")
    state = "closed" if found.closed_at else "open"
    typer.echo(f"    {state}{'; blocked' if found.blocked else ''}")


app.command("retry")(on_experts(Deed.RETRY, "Put what was refused back into the inbox, and close the case."))
app.command("discard")(on_experts(Deed.DISCARD, "Remove what was refused for good, and close the case."))
