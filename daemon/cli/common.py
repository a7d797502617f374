"""What the verbs share: options, finding the home, printing tables or JSON, how they end."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from daemon.errors import BadHome, DaemonError
from daemon.layout import Home
from projector.errors import DeviceLost, ProjectorError
from registry.errors import RegistryError
from registry.records import Score

if TYPE_CHECKING:
    from daemon.config import Settings
    from registry.reader import Reader

KNOWN = (DaemonError, ProjectorError, RegistryError, DeviceLost)
SAFE = "see the message; what was already published is safe"

HomeArgument = Annotated[
    Path | None,
    typer.Argument(metavar="HOME", help="The home; else MAINSTEM_HOME, or the current folder.", show_default=False),
]
HomeOption = Annotated[Path | None, typer.Option("--home", metavar="HOME", help="The same as an option.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
PathArgument = Annotated[Path, typer.Argument(show_default=False)]


def complain(message: str, hint: str) -> None:
    """Prints what is wrong and what to do on standard error."""
    typer.echo(f"mainstem: {message}", err=True)
    if hint:
        typer.echo(f"    hint: {hint}", err=True)


def one_home(argument: Path | None, option: Path | None) -> Path | None:
    """The home that was named as an argument or as an option, which is the same."""
    if argument and option and argument.resolve() != option.resolve():
        raise typer.BadParameter(f"{argument} is another home than --home {option}", param_hint="HOME")
    return argument or option


def named_home(argument: Path | None, option: Path | None) -> Path | None:
    """The home that was named: as an argument, as an option or by MAINSTEM_HOME; None where it was not."""
    always = os.environ.get("MAINSTEM_HOME")
    return one_home(argument, option) or (Path(always) if always else None)


def find_home(argument: Path | None, option: Path | None) -> Home:
    """The home that was named, or the current folder. Raises BadHome where it is none."""
    home = Home((named_home(argument, option) or Path.cwd()).resolve())
    if not home.exists():
        hint = f"name one, or make one, with the model that experts come from: mainstem init {home.root} --base PATH"
        raise BadHome(f"{home.root} is not a mainstem home", hint)
    return home


def open_reader(argument: Path | None, option: Path | None) -> tuple[Home, "Reader"]:
    """The home and its registry, read-only."""
    from registry.reader import Reader

    home = find_home(argument, option)
    return home, Reader.open(home.registry)


def settings_of(
    home: Home, flags: Mapping[str, Mapping[str, Any]] | None = None, *, needed: bool = False
) -> "Settings":
    """The settings in force for a home. needed: BadConfig where its mainstem.toml is missing."""
    from daemon.config import load

    return load(home.config, flags, needed=needed)


@contextmanager
def logged(config: Path | None) -> Iterator[None]:
    """Sets the log up by what that mainstem.toml and the environment say of it, as far as they can be read. Where it is
    JSON lines, whatever is raised inside is the last of them, and exit status 1.
    """
    from daemon.config import log_of
    from daemon.logs import configure, is_json

    configure(log_of(config))
    try:
        yield
    except Exception as error:
        if not is_json():
            raise
        import structlog

        log = structlog.get_logger()
        if isinstance(error, KNOWN):
            log.critical("ended by an error", error=str(error), reason=str(error.reason), hint=error.hint)
        elif isinstance(error, OSError):
            log.critical("ended by an error", error=str(error), hint=SAFE)
        else:
            log.critical("ended by a fault of the program", error=repr(error), exc_info=True, hint=SAFE)
        sys.exit(1)


def print_json(value: Any) -> None:
    """Prints a value, dataclasses and all, as JSON."""
    typer.echo(json.dumps(value, indent=2, default=plain))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table for people; wide where the output is not a terminal."""
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "200"))
    Console(width=width, highlight=False, markup=False, emoji=False).print(make_table(columns, rows))


def make_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table for people."""
    table = Table(*columns, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    return table


def local(moment: datetime | str | None) -> str:
    """A moment, or one in ISO 8601, as people read it: in local time, with its zone."""
    then = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return then.astimezone().isoformat(" ", "seconds") if then else "-"


def in_words(score: Score) -> str:
    """A score as people read it, and what is known of it.

    >>> in_words(Score(0.25, n=200, stderr=0.03, held_out=True))
    '0.25 +- 0.03, of 200, held out'
    """
    error = "" if score.stderr is None else f" +- {score.stderr:.3g}"
    more = {f"of {score.n}": score.n is not None, "held out": score.held_out}
    more["lower is better"] = not score.higher_is_better
    return ", ".join([f"{score.score:.6g}{error}", *(words for words, holds in more.items() if holds)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def plain(value: Any) -> Any:
    """A value that JSON has no word for, as one that it has."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value)
