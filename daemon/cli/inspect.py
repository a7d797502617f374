"""`mainstem inspect`: a dry run."""

from typing import Annotated, Any

import typer

from daemon.cli.common import HomeOption, JsonOption, PathArgument, open_reader, print_json, size
from daemon.errors import DaemonError
from projector.errors import ProjectorError


def command(
    path: PathArgument,
    home: HomeOption = None,
    as_json: JsonOption = False,
    head: Annotated[str | None, typer.Option(help="The head to compare with; by default the first.")] = None,
) -> None:
    """Would this expert be accepted? Its norm, its overlap with what is merged, and what merging it would cost.

    Nothing is changed. Exit status 1 where it would be refused.
    """
    from daemon.inspection import inspect

    where, reader = open_reader(home)
    with reader:
        try:
            found: dict[str, Any] = {"accepted": True, **inspect(where, reader, path, head)}
        except (DaemonError, ProjectorError) as error:
            found = {"accepted": False, "reason": str(error.reason), "detail": str(error), "hint": error.hint}
    if as_json:
        print_json(found)
    else:
        typer.echo("\n".join(f"{key:<16} {_shown(key, value)}" for key, value in found.items() if value is not None))
    if not found["accepted"]:
        raise typer.Exit(1)


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return size(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
