"""`mainstem status`: the daemon, the heads, the queue, and what became of the experts."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, local, open_reader, print_json, print_table
from daemon.notation import called
from projector.text import shown, size
from registry.records import Flag

if TYPE_CHECKING:
    from daemon.home.condition import Condition
    from registry.records import Expert

FLAGGED = 5  # the newest of them are named


def command(at: HomeArgument = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show whether a daemon runs and what it does, the live version of every head, what is held, what waits and why,
    the counts.
    """
    from daemon.home.condition import condition
    from daemon.home.standing import held

    where, reader = open_reader(at, home)
    with reader:
        base, heads, counts = reader.base(), reader.heads(), reader.counts()
        versions = {head.name: reader.version(head.name, head.live) for head in heads}
        not_live = {head.name: held(reader, head) for head in heads}
        open_cases = reader.count_open()
        flagged = reader.experts(limit=FLAGGED, flags=tuple(Flag))
        now = condition(where, reader)
    daemon, waiting, troubles = now.daemon, now.queue(), [asdict(one) for one in now.troubles]
    if as_json:
        print_json(
            {
                "home": str(where.root),
                "base": asdict(base),
                "doing": now.doing,
                "text": now.text,
                "left_seconds": now.left_seconds,
                "daemon": daemon and asdict(daemon),
                "heads": [
                    {
                        **asdict(head),
                        "figures": getattr(versions[head.name], "figures", {}),
                        "held": (stays := not_live[head.name]) and asdict(stays),
                    }
                    for head in heads
                ],
                "inbox": None if waiting is None else [one["name"] for one in waiting],
                "waiting": waiting,
                "experts": {str(status): count for status, count in counts.items()},
                "open_cases": open_cases,
                "flagged": [{"id": expert.id, "name": expert.name, "flags": expert.flags} for expert in flagged],
                "troubles": troubles,
            }
        )
        return
    typer.echo(f"home     {where.root}")
    typer.echo(
        f"base     {base.name}  {base.parameters:,} parameters, {size(base.size_bytes)}, sha256 {base.sha256[:12]}"
    )
    typer.echo(f"daemon   {_daemon(now)}")
    typer.echo(f"inbox    {'cannot be listed by this user' if waiting is None else f'{len(waiting)} waiting'}")
    for one in (waiting or [])[:5]:
        typer.echo(f"         {one['name']}: {one['why']}")
    if waiting and len(waiting) > 5:
        typer.echo(f"         and {len(waiting) - 5} more: --json has them all")
    typer.echo("experts  " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    if flagged:
        typer.echo(f"flagged  {_flagged(flagged)}; `mainstem log --flag any` has them all")
    if open_cases:
        cases = "1 case" if open_cases == 1 else f"{open_cases} cases"
        typer.echo(f"open     {cases} of quarantine: `mainstem quarantine list`")
    for head in heads:
        if stays := not_live[head.name]:
            which = f"{called(head.name, stays.version)}, the newest, is not live"
            what = f"{which}, nor will the next be" if stays.frozen else which
            typer.echo(f"held     {what}: {shown(stays.why)} (`{stays.command}`)")
    for trouble in (one for one in troubles if one["reason"] != "no_daemon"):
        typer.echo(f"wrong    {trouble['text']} ({trouble['hint']})")
    typer.echo()
    print_table(
        ("head", "method", "live", "newest", "since", "figures"),
        (
            (
                head.name,
                f"{head.method}, relative to {head.relative_to}" if head.relative_to != "base" else head.method,
                called(head.name, head.live),
                called(head.name, head.newest) if head.newest != head.live else None,
                local(version.created_at) if version else "-",
                _figures(version),
            )
            for head in heads
            for version in [versions[head.name]]
        ),
    )


def _daemon(now: "Condition") -> str:
    daemon = now.daemon
    if daemon is None:
        return "no daemon runs: start `mainstem run`"
    where = f", at {daemon.url}" if daemon.url else ""
    return f"{now.text} (process {daemon.pid} since {local(daemon.since)}{where})"


def _flagged(experts: "Sequence[Expert]") -> str:
    return ", ".join(f"{expert.name} ({', '.join(expert.flags)})" for expert in experts)


def _figures(version: object) -> str:
    figures: dict[str, float] = getattr(version, "figures", {})
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items()) or "-"
