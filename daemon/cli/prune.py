"""`mainstem prune`: the archive and what was refused are thinned out."""

import re
from typing import Annotated

import typer

from daemon.cli.asking import DryRunOption, ReasonOption, meanwhile, tell
from daemon.cli.common import HomeArgument, HomeOption, JsonOption, open_reader
from registry.records import Deed

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def command(
    at: HomeArgument = None,
    archive: Annotated[bool, typer.Option("--archive", help="Only the archive.")] = False,
    quarantine: Annotated[bool, typer.Option("--quarantine", help="Only what was refused.")] = False,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="What was decided longer ago: 30d, 12h, 2w.")
    ] = None,
    larger_than: Annotated[str | None, typer.Option(metavar="SIZE", help="What is larger: 500MB, 2GiB.")] = None,
    reason: ReasonOption = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what was kept of experts: by age and size, or else only what nothing reads any more, which are duplicates,
    withdrawn experts and cases that were looked after. Says what is lost by it; the models do not change.
    """
    from daemon.home.presence import lock
    from daemon.interventions import pruning
    from daemon.interventions.deeds import Request, whoever
    from daemon.interventions.requests import ask

    both = not (archive or quarantine)
    try:
        wanted = pruning.Prune(archive or both, quarantine or both, _seconds(older_than), _bytes(larger_than))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--older-than") from None
    where, reader = open_reader(at, home)
    if dry_run:
        with reader:
            lines = pruning.planned(where, reader, wanted)
    else:
        reader.close()
        request = Request(Deed.PRUNE, whoever(), reason, prune=wanted)
        alone = lambda: pruning.remove_alone(where, lock(where), wanted, request.intervention)  # noqa: E731
        lines = ask(where, request, alone, meanwhile(as_json))
    tell(Deed.PRUNE, lines, dry_run, as_json, "nothing is to be pruned", "nothing was done; this would go:")


def _seconds(age: str | None) -> float | None:
    if age is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", age)
    if not found:
        raise typer.BadParameter("a number and one of s, m, h, d, w: 30d", param_hint="--older-than")
    return float(found[1]) * UNITS[found[2]]


def _bytes(words: str | None) -> int | None:
    if words is None:
        return None
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        return int(TypeAdapter(ByteSize).validate_python(words))
    except ValidationError:
        raise typer.BadParameter("a number of bytes, or one with a unit: 500MB", param_hint="--larger-than") from None
