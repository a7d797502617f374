"""`mainstem status`: the heads, the queue, and what became of the experts."""

import os
from dataclasses import asdict

import typer

from daemon.cli.common import HomeOption, JsonOption, ago, open_reader, print_json, print_table, size
from projector.text import shown


def command(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show the live version of every head, what waits in the inbox, and the counts."""
    from daemon.inbox import TEMPORARY

    where, reader = open_reader(home)
    with reader:
        base, heads, counts = reader.base(), reader.heads(), reader.counts()
        versions = {head.name: reader.version(head.name, head.live) for head in heads}
    there = os.listdir(where.inbox) if where.inbox.is_dir() else []  # gone: /readyz says so, and the rest is to be seen
    queue = sorted(shown(name) for name in there if not TEMPORARY.fullmatch(name))
    if as_json:
        print_json(
            {
                "home": str(where.root),
                "base": asdict(base),
                "heads": [{**asdict(head), "figures": getattr(versions[head.name], "figures", {})} for head in heads],
                "inbox": queue,
                "experts": {str(status): count for status, count in counts.items()},
            }
        )
        return
    typer.echo(f"home   {where.root}")
    typer.echo(
        f"base   {base.name}  {base.parameters:,} parameters, {size(base.size_bytes)}, sha256 {base.sha256[:12]}"
    )
    typer.echo(
        f"inbox  {len(queue)} waiting{': ' + ', '.join(queue[:5]) if queue else ''}{' ...' if len(queue) > 5 else ''}"
    )
    typer.echo("       " + ", ".join(f"{count} {status}" for status, count in counts.items()) + "\n")
    print_table(
        ("head", "method", "live", "since", "figures"),
        (
            (head.name, head.method, head.live, ago(version.created_at) if version else "-", _figures(version))
            for head in heads
            for version in [versions[head.name]]
        ),
    )


def _figures(version: object) -> str:
    figures: dict[str, float] = getattr(version, "figures", {})
    return ", ".join(f"{key} {value:.4g}" for key, value in figures.items()) or "-"
