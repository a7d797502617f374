"""`mainstem log`: the lineage."""

from collections.abc import Collection
from dataclasses import asdict
from enum import StrEnum
from typing import Annotated

import typer

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, local, open_reader, print_json, print_table
from registry.records import Flag, Status


class Flagged(StrEnum):
    """What --flag takes: one of the flags, or any of them."""

    ANY = "any"
    LONG = Flag.LONG.value
    SHORT = Flag.SHORT.value
    RESIZED = Flag.RESIZED.value
    BUFFER = Flag.BUFFER.value


def command(
    at: HomeArgument = None,
    home: HomeOption = None,
    limit: Annotated[int, typer.Option(help="How many experts, newest first.", min=1, max=1_000_000)] = 20,
    status: Annotated[Status | None, typer.Option(help="Only experts of this status.")] = None,
    name: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only experts called so: as dropped, or in their expert.json.")
    ] = None,
    flag: Annotated[
        Flagged | None,
        typer.Option(help="Only experts that were merged although they are odd: in this way, or in any."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the experts, newest first: what became of each, and in which version it is."""
    _, reader = open_reader(at, home)
    with reader:
        experts = reader.experts(status, limit, name=name, flags=_flags(flag))
        counts = reader.counts()
        every = counts[status] if status else sum(counts.values())
        more = every > len(experts) == limit
        if more and (name or flag):  # which nobody counts
            more = bool(reader.experts(status, 1, experts[-1].id, name, _flags(flag)))
    if as_json:
        print_json([asdict(expert) for expert in experts])
        return
    print_table(
        ("id", "finished", "status", "version", "norm", "flags", "weight", "sha256", "name", "task", "from", "reason"),
        (
            (
                e.id,
                local(e.finished_at),
                e.status,
                e.version,
                e.norm,
                ", ".join(e.flags) or "-",
                e.weight,
                (e.sha256 or "-")[:12],
                e.name if e.given_name is None else f"{e.name} ({e.given_name})",
                e.about and e.about.get("task"),
                e.trained_from,
                e.reason
                or (e.duplicate_of and f"of {e.duplicate_of}")
                or (e.withdrawn_in and f"with version {e.withdrawn_in}"),
            )
            for e in experts
        ),
    )
    if more:
        among = "" if name or flag else f" of {every}"
        typer.echo(f"these are the newest {len(experts)}{among}: --limit N lists more")


def _flags(wanted: Flagged | None) -> Collection[Flag]:
    return () if wanted is None else tuple(Flag) if wanted is Flagged.ANY else (Flag(wanted.value),)
