"""`mainstem push`: an expert is sent to a running daemon; with --wait the exit status says what became of it."""

import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from daemon.cli.common import JsonOption, print_json
from daemon.errors import DaemonError, NotUploaded, Reason
from daemon.notation import called
from daemon.pull.client import Origin
from daemon.pull.pushing import Pushed, Report, push, verdict
from projector.text import shown, size

STATUS = {"live": 0, "held": 3, "rejected": 4, "refused": 5, "duplicate": 6, "withdrawn": 7}
TOO_LATE = 8
MOST = 4000  # letters of a server's sentence: its end is the command that mends it


def command(
    path: Annotated[Path, typer.Argument(help="The checkpoint: a .safetensors file, or a folder.", show_default=False)],
    url: Annotated[str, typer.Argument(help="Where a mainstem runs: http://HOST:PORT", show_default=False)],
    name: Annotated[
        str | None, typer.Option(help="What it is called there: as the file or folder, by default.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it is decided; the exit status says how.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="The longest that --wait waits; then status 8.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(envvar="MAINSTEM_TOKEN", help="The write token, sent as a bearer token.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Send an expert into the inbox of a running daemon. What of a folder is there already is not sent again.

    With --wait: status 0 it is live, 3 merged and held, 4 rejected by the gate, 5 refused, 6 a duplicate, 7 withdrawn
    again, 8 not decided in time; 1 where it could not be sent.
    """
    _check(path, name)
    origin = Origin.of(url, token)
    with _bar() as report:
        pushed = push(path, origin, name, report)
    if not as_json:
        typer.echo(_line(pushed))
    found: Mapping[str, Any] | None = None
    if wait:
        found = verdict(origin, pushed, lambda why: typer.echo(f"it waits: {shown(why, MOST)}", err=True), timeout)
    if as_json:
        said = {key: value for key, value in asdict(pushed).items() if key != "after"}
        outcome = found["outcome"] if found else None
        print_json({**said, "url": str(origin), "outcome": outcome, "expert": found})
    elif found:
        for line in _verdict(found):
            typer.echo(line)
    elif wait:
        typer.echo(f"it is not decided after {timeout:g} seconds")
    if wait:
        raise typer.Exit(STATUS.get(str(found["outcome"]), 1) if found else TOO_LATE)


def _check(path: Path, name: str | None) -> None:
    """Raises DaemonError where no server takes it by that name, or of that kind."""
    from daemon.arrivals.receiving import LONGEST_NAME, check_name

    if path.is_file() and path.suffix != ".safetensors":
        out = quote(f"{path.stem}.safetensors")
        raise DaemonError(
            Reason.PULL,
            f"{path} is not a .safetensors file",
            f"`mainstem convert {quote(str(path))} {out}`, then push {out}",
        )
    name = name or path.absolute().name
    try:
        check_name(name)
    except NotUploaded as error:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
        other = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip(".-")[:LONGEST_NAME] or "expert"
        raise DaemonError(Reason.PULL, str(error), f"send it as another: --name {other} ({error.hint})") from None


def _line(pushed: Pushed) -> str:
    files = f"{pushed.files} files, " if pushed.files > 1 else ""
    there = "" if pushed.sent_bytes == pushed.size_bytes else f" ({size(pushed.sent_bytes)} of it sent)"
    return f"{shown(pushed.name)}: {files}{size(pushed.size_bytes)} in the inbox{there}"


def _verdict(found: Mapping[str, Any]) -> list[str]:
    """What became of it, in lines of words."""
    outcome, which = found["outcome"], f"expert {found['id']}"
    if outcome == "live":
        return [f"live: {which}, in version {found['version']}"]
    if outcome == "held":
        return [
            f"held: {called(one['head'], one['version'])}: {shown(one['why'], MOST)} (`{one['command']}` makes it live)"
            for one in found["held"]
        ]
    if outcome == "duplicate" and not found["detail"]:  # else the other one was rejected, or taken out: why, and a hint
        return [f"duplicate: {which} is expert {found['duplicate_of']} once more: nothing was merged"]
    words = (found["reason"] or (outcome == "withdrawn" and "taken out again"), shown(found["detail"] or "", MOST))
    lines = [": ".join([outcome, which, *filter(None, words)])]
    return [*lines, f"    hint: {shown(found['hint'], MOST)}"] if found["hint"] else lines


@contextmanager
def _bar() -> Iterator[Report]:
    """A progress bar over all files, on a terminal."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    columns = (TextColumn("push"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("push", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
