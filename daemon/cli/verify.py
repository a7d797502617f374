"""`mainstem verify`: re-hash everything."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import typer
from rich.console import Console

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, open_reader, print_json
from projector.text import size


def command(at: HomeArgument = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Re-hash the base, every version and every archived expert against manifests and registry.

    Prints what differs, what to do about it, and a line at the end. Exit status 1 where anything does.
    """
    from daemon.home.verification import verify

    where, reader = open_reader(at, home)
    with reader, _status() as say:
        checked, found = verify(where, reader, say)
    if as_json:
        print_json({**asdict(checked), "problems": found})
    else:
        for problem in found:
            typer.echo(problem)
        for hint in checked.hints:
            typer.echo(f"    hint: {hint}")
        things = f"the base, {_count(checked.versions, 'version')} and {_count(checked.experts, 'archived expert')}"
        read = f"{_count(checked.files, 'file')}, {size(checked.size_bytes)} read"
        typer.echo(f"{things}: {read}, {_count(len(found), 'problem') if found else 'no problems'}")
    if found:
        raise typer.Exit(1)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


@contextmanager
def _status() -> Iterator[Callable[[str], object]]:
    """What is being read, in one line that is gone at the end; on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with Console(stderr=True, markup=False).status("checking") as status:
        yield lambda what: status.update(f"checking {what}")
