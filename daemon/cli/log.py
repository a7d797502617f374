"""`mainstem log`: the experts, the versions of the heads, and what people did."""

from collections.abc import Collection
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, local, open_reader, print_json, print_table
from daemon.errors import DaemonError, Reason
from daemon.evaluation.figures import accumulation
from daemon.notation import called
from projector.text import listed, shown
from registry.records import Flag, Head, Intervention, Status, Version, plain_scores

if TYPE_CHECKING:
    from registry.reader import Reader


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
    limit: Annotated[
        int, typer.Option(help="How many, newest first; versions of each head.", min=1, max=1_000_000)
    ] = 20,
    status: Annotated[Status | None, typer.Option(help="Only experts of this status.")] = None,
    name: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only experts called so: as dropped, or in their expert.json.")
    ] = None,
    flag: Annotated[
        Flagged | None,
        typer.Option(help="Only experts that were merged although they are odd: in this way, or in any."),
    ] = None,
    versions: Annotated[
        bool, typer.Option("--versions", help="The versions instead: which is live, held or kept, with their scores.")
    ] = False,
    head: Annotated[str | None, typer.Option(help="With --versions: of this head alone.")] = None,
    interventions: Annotated[
        bool, typer.Option("--interventions", help="Instead: what people did, who, when and why.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the experts, newest first: what became of each, and in which version it is. Or the versions, or what people
    did.
    """
    if (versions and interventions) or ((versions or interventions) and (status or name or flag)):
        raise typer.BadParameter("--versions and --interventions stand alone: the other filters are for experts")
    if head is not None and not versions:
        raise typer.BadParameter("it is for --versions", param_hint="--head")
    _, reader = open_reader(at, home)
    with reader:
        if versions:
            _versions(reader, head, limit, as_json)
            return
        if interventions:
            _interventions(reader, limit, as_json)
            return
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
                or (e.withdrawn_in and f"with version {e.withdrawn_in}")
                or ("blocked" if e.blocked else None),
            )
            for e in experts
        ),
    )
    if more:
        among = "" if name or flag else f" of {every}"
        typer.echo(f"these are the newest {len(experts)}{among}: --limit N lists more")


def _flags(wanted: Flagged | None) -> Collection[Flag]:
    return () if wanted is None else tuple(Flag) if wanted is Flagged.ANY else (Flag(wanted.value),)


def _versions(reader: "Reader", name: str | None, limit: int, as_json: bool) -> None:
    """The newest `limit` versions of each head, or of the one named."""
    from daemon.home.standing import withdrawn_since

    heads = reader.heads()
    if name is not None and name not in {head.name for head in heads}:
        raise DaemonError(Reason.UNKNOWN, f"there is no head {name!r}", "see `mainstem status` for the heads")
    told = [
        (head, version)
        for head in heads
        if name in (None, head.name)
        for version in reader.versions(head.name, limit=limit)
    ]
    evaluations = reader.evaluations(version.evaluation for _, version in told)
    scores = [one.scores if (one := evaluations.get(version.evaluation or 0)) else None for _, version in told]
    means = [accumulation(found) if found else None for found in scores]
    later = withdrawn_since(reader, (version.number for _, version in told if not version.collected))
    gone = {number: [expert.id for expert in experts] for number, experts in later.items()}
    if as_json:
        print_json(
            [
                {
                    **asdict(version),
                    "live": head.live == version.number,
                    "mean": average,
                    "scores": found and plain_scores(found),
                    "withdrawn": [] if version.collected else gone[version.number],
                }
                for (head, version), found, average in zip(told, scores, means, strict=True)
            ]
        )
        return
    print_table(
        ("version", "made", "parent", "expert", "mean", "kept", "standing"),
        (
            (
                called(head.name, version.number),
                local(version.created_at),
                version.parent,
                version.expert_id,
                average,
                "removed" if version.collected else "pinned" if version.pinned else "kept",
                _standing(head, version, [] if version.collected else gone[version.number]),
            )
            for (head, version), average in zip(told, means, strict=True)
        ),
    )
    oldest = {head.name: version.number for head, version in told}  # no head is without version 0
    if more := [name for name, number in oldest.items() if number > 0]:
        typer.echo(f"these are the newest {limit} of {', '.join(more)}: --limit N lists more")


def _standing(head: Head, version: Version, withdrawn: Collection[int]) -> str | None:
    said = [f"with expert {listed(map(str, withdrawn))}, withdrawn since"] if withdrawn else []
    if version.number == head.live:
        said.append("live")
    elif version.held is not None:
        said.append(f"held: {shown(version.held)}")
    elif version.number > head.live:
        said.append("rolled back")
    return "; ".join(said) or None


def _interventions(reader: "Reader", limit: int, as_json: bool) -> None:
    done = reader.interventions(limit)
    if as_json:
        print_json([asdict(one) for one in done])
        return
    rows = (
        (
            local(one.at),
            shown(one.who),
            one.deed,
            _about(one),
            None if one.previous is None or one.head is None else called(one.head, one.previous),
            one.why and shown(one.why),
        )
        for one in done
    )
    print_table(("when", "who", "deed", "what", "live before", "why"), rows)
    if len(done) == limit:
        typer.echo(f"these are the newest {limit}: --limit N lists more")


def _about(done: Intervention) -> str:
    version = [] if done.version is None else [called(done.head, done.version) if done.head else f"{done.version}"]
    experts = [f"expert {', '.join(map(str, done.experts))}"] if done.experts else []
    return ", with ".join(experts + version)
