"""`mainstem inspect`: a dry run."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, PathArgument, open_reader, print_json
from daemon.errors import BadConfig, DaemonError
from projector.errors import ProjectorError
from projector.text import shown, size

MOST_NAMES = 40


def command(
    path: PathArgument,
    at: HomeArgument = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
    head: Annotated[str | None, typer.Option(help="The head to compare with; by default the first.")] = None,
) -> None:
    """Would this expert be accepted? Its norm, its overlap with what is merged, and what merging it would cost.

    Nothing is changed. Exit status 1 where it would be refused.
    """
    from daemon.config import taking_effect
    from daemon.reports.inspect import inspect

    where, reader = open_reader(at, home)
    with reader:
        try:
            found: dict[str, Any] = {"accepted": True, **inspect(where, reader, path, head)}
        except BadConfig:
            raise
        except (DaemonError, ProjectorError) as error:
            found = {
                "accepted": False,
                "reason": str(error.reason),
                "detail": str(error),
                "hint": taking_effect(error.hint, "drop it"),
            }
    if as_json:
        print_json(found)
    else:
        for key, value in found.items():
            for line in _lines(key, value):
                typer.echo(f"{key:<16} {line}")
    if not found["accepted"]:
        raise typer.Exit(1)


def _lines(key: str, value: Any) -> list[str]:
    """Names once for all layers: a number in them is a *."""
    if key == "layers":
        return [f"{_list(one)}: {one['tensors']} tensors" for one in value]
    if key == "layer_scales":
        return [
            f"{head}: {one:g} in the first layer and outside, {two:g} in the last" for head, (one, two) in value.items()
        ]
    if isinstance(value, dict):
        return _some(f"{_uncounted(theirs)} -> {_uncounted(ours)}" for theirs, ours in value.items())
    if isinstance(value, list):
        return _some(map(_uncounted, value))
    if key.endswith("_bytes"):
        return [size(value)]
    return [] if value is None else [f"{value:.6g}" if isinstance(value, float) else str(value)]


def _list(layers: Mapping[str, Any]) -> str:
    """ "encoder.layer.0 to 11"."""
    name = f"{shown(layers['name'])}." if layers["name"] else ""
    return f"{name}{layers['first']} to {layers['last']}"


def _some(lines: Iterable[str]) -> list[str]:
    different = list(dict.fromkeys(lines))
    more = len(different) - MOST_NAMES
    return different[:MOST_NAMES] + ([f"and {more} more: --json lists all"] if more > 0 else [])


def _uncounted(name: str) -> str:
    return shown(".".join("*" if part.isdigit() else part for part in name.split(".")))
