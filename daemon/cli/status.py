"""`mainstem status`: the daemon, the heads, the queue, and what became of the experts; of one home or of several."""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from daemon.cli.common import (
    HomeArgument,
    HomeOption,
    JsonOption,
    local,
    make_table,
    one_home,
    open_reader,
    plain,
    print_json,
    print_table,
)
from daemon.errors import BadHome
from daemon.layout import Home
from daemon.notation import called
from projector.text import shown, size
from registry.errors import RegistryError
from registry.records import Flag

if TYPE_CHECKING:
    from registry.reader import Reader

FLAGGED = 5  # the newest of them are named
WAITING = 5  # the first of them are named, where people read it
MOST = 4000  # letters of why a version is held: which rule it breaks, and by how much
WATCH_SECONDS = 1.0
DEEPEST = 4  # folders below DIR in which homes are looked for
HEADS = ("head", "method", "live", "newest", "since", "figures")
HOMES = ("home", "doing", "live", "waiting", "open", "wrong")
PASSING = ("left_seconds", "share")  # what changes all the time, and is no reason for another line
LONG = re.compile(r" for [\d.]+ (s|min|h|days)\b")

Looked = dict[str, Any]


def command(
    at: HomeArgument = None,
    home: HomeOption = None,
    every: Annotated[
        Path | None, typer.Option("--all", metavar="DIR", help="Every home below DIR instead, a line for each.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on, every second, until Ctrl-C; not on a terminal: lines, on a change.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show whether a daemon runs and what it does, the live version of every head, what is held, what waits and why,
    the counts.
    """
    with ExitStack() as closing:
        if every is not None:
            if one_home(at, home):  # MAINSTEM_HOME says what is looked at where nothing is named
                raise typer.BadParameter("leave HOME out, or this", param_hint="--all")
            look: Callable[[], Looked | list[Looked]] = lambda: [_of(every, one) for one in homes_below(every)]  # noqa: E731
        else:
            where, reader = open_reader(at, home)
            closing.enter_context(reader)
            look = lambda: looked(where, reader)  # noqa: E731
        if watch:
            _watch(look, as_json)
        elif as_json:
            print_json(look())
        elif isinstance(found := look(), list):
            print_table(HOMES, _homes(found))
        else:
            typer.echo("\n".join(_lines(found)) + "\n")
            print_table(HEADS, _heads(found))


def looked(where: Home, reader: "Reader") -> Looked:
    """All that is shown of a home, by the names that JSON has."""
    from daemon.home.attention import attention
    from daemon.home.condition import condition
    from daemon.home.standing import held

    heads, counts = reader.heads(), reader.counts()
    versions = {head.name: reader.version(head.name, head.live) for head in heads}
    flagged = reader.experts(limit=FLAGGED, flags=tuple(Flag))
    now = condition(where, reader)
    waiting = now.queue()
    return {
        "home": str(where.root),
        "base": asdict(reader.base()),
        "doing": now.doing,
        "text": now.text,
        "expert": now.expert,
        "share": now.share,
        "left_seconds": now.left_seconds,
        "daemon": now.daemon and asdict(now.daemon),
        "heads": [
            {
                **asdict(head),
                "figures": getattr(versions[head.name], "figures", {}),
                "created_at": getattr(versions[head.name], "created_at", None),
                "held": (stays := held(where, reader, head)) and asdict(stays),
            }
            for head in heads
        ],
        "inbox": None if waiting is None else [one["name"] for one in waiting],
        "waiting": waiting,
        "experts": {str(status): count for status, count in counts.items()},
        "open_cases": reader.count_open(),
        "flagged": [{"id": expert.id, "name": expert.name, "flags": expert.flags} for expert in flagged],
        "troubles": [asdict(one) for one in now.troubles],
        "attention": [asdict(matter) for matter in attention(now, reader, where, str(where.root))],
    }


def homes_below(folder: Path) -> list[Path]:
    """The homes in a folder, or below it, sorted; none within another. Raises BadHome where there is none."""
    found = sorted(_homes_below(folder, DEEPEST))
    if not found:
        raise BadHome(f"there is no home in {folder}", "give the folder that the homes are in")
    return found


def _homes_below(folder: Path, levels: int) -> Iterator[Path]:
    if Home(folder).exists():
        yield folder
    elif levels:
        try:
            below = [Path(one) for one in os.scandir(folder) if one.is_dir(follow_symlinks=False)]
        except OSError:
            return  # nobody's home that this user may look at
        for path in below:
            yield from _homes_below(path, levels - 1)


def _of(root: Path, path: Path) -> Looked:
    """What is shown of one home of several; where it cannot be read, that."""
    from registry.reader import Reader

    name = str(path.relative_to(root)) if path != root else path.name
    try:
        with Reader.open(Home(path).registry) as reader:
            found = looked(Home(path), reader)
    except RegistryError as error:
        return {"name": name, "home": str(path), "doing": "unreadable", "text": str(error), "hint": error.hint}
    return {
        "name": name,
        "home": str(path),
        "doing": found["doing"],
        "text": found["text"],
        "url": found["daemon"] and found["daemon"]["url"],
        "heads": [{key: head[key] for key in ("name", "live", "newest")} for head in found["heads"]],
        "waiting": None if found["waiting"] is None else len(_queue(found) or ()),
        "open_cases": found["open_cases"],
        "troubles": [one["reason"] for one in found["troubles"]],
    }


def _watch(look: Callable[[], Looked | list[Looked]], as_json: bool) -> None:
    """Looks every second, until somebody interrupts it, which is its end and no error."""
    try:
        if as_json or not sys.stdout.isatty():
            _print_changes(look, as_json)
        with Live(auto_refresh=False) as live:
            while True:
                live.update(_shown(look), refresh=True)
                time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        return


def _print_changes(look: Callable[[], Looked | list[Looked]], as_json: bool) -> None:
    """A line for each change, and of several homes for each that changed."""
    said: dict[str, str] = {}
    while True:
        found = look()
        for one in found if isinstance(found, list) else [found]:
            now = _lasting(one, as_json)
            if said.get(one["home"]) != now:
                said[one["home"]] = now
                moment = datetime.now().astimezone().isoformat(timespec="seconds")
                typer.echo(json.dumps({"at": moment, **one}, default=plain) if as_json else f"{moment} {_summed(one)}")
        sys.stdout.flush()
        time.sleep(WATCH_SECONDS)


def _lasting(one: Looked, as_json: bool) -> str:
    """What is shown, as it stays while nothing happens: how long something has been so is no change."""
    kept = {key: value for key, value in one.items() if key not in PASSING} if as_json else _summed(one)
    return LONG.sub("", json.dumps(kept, default=plain))


def _summed(one: Looked) -> str:
    """A home in one line."""
    name = f"{one['name']}: " if "name" in one else ""
    return f"{name}{_live(one)} {shown(one['text'])}".strip()


def _shown(look: Callable[[], Looked | list[Looked]]) -> Group | Text:
    try:
        found = look()
    except (RegistryError, BadHome) as error:  # for a moment, perhaps
        return Text(f"{error}\n    hint: {error.hint}")
    if isinstance(found, list):
        return Group(make_table(HOMES, _homes(found)))
    table: Table = make_table(HEADS, _heads(found))
    return Group(Text("\n".join(_lines(found)) + "\n"), table)


def _lines(found: Looked) -> list[str]:
    """What people read of one home, before the table of its heads."""
    base, waiting = found["base"], _queue(found)
    parameters = f"{base['parameters']:,} parameters, {size(base['size_bytes'])}"
    lines = [
        f"home     {found['home']}",
        f"base     {base['name']}  {parameters}, sha256 {base['sha256'][:12]}",
        f"daemon   {_daemon(found)}",
        f"inbox    {'cannot be listed by this user' if waiting is None else f'{len(waiting)} waiting'}",
    ]
    lines += [f"         {one['name']}: {one['why']}" for one in (waiting or [])[:WAITING]]
    if waiting and len(waiting) > WAITING:
        lines.append(f"         and {len(waiting) - WAITING} more: --json has them all")
    lines.append("experts  " + ", ".join(f"{count} {status}" for status, count in found["experts"].items()))
    if found["flagged"]:
        lines.append(f"flagged  {_flagged(found['flagged'])}; `mainstem log --flag any` has them all")
    if count := found["open_cases"]:
        cases = "1 case" if count == 1 else f"{count} cases"
        lines.append(f"open     {cases} of quarantine: `mainstem quarantine list`")
    for head in found["heads"]:
        if stays := head["held"]:
            which = f"{called(head['name'], stays['version'])}, the newest, is not live"
            what = f"{which}, nor will the next be" if stays["frozen"] else which
            lines.append(f"held     {what}: {shown(stays['why'], MOST)} (`{stays['command']}`)")
    untold = [one for one in found["attention"] if one["kind"] == "undelivered"]
    lines += [f"untold   {one['text']}; {one['hint']}" for one in untold]
    wrong = [one for one in found["troubles"] if one["reason"] != "no_daemon"]
    return lines + [f"wrong    {one['text']} ({one['hint']})" for one in wrong]


def _queue(found: Looked) -> list[Looked] | None:
    """What waits, without what is in hand, as the page counts; None where the inbox cannot be listed."""
    waiting: list[Looked] | None = found["waiting"]
    return waiting and [one for one in waiting if one["name"] != found["expert"]]


def _heads(found: Looked) -> list[Sequence[Any]]:
    return [
        (
            head["name"],
            f"{head['method']}, relative to {head['relative_to']}" if head["relative_to"] != "base" else head["method"],
            called(head["name"], head["live"]),
            called(head["name"], head["newest"]) if head["newest"] != head["live"] else None,
            local(head["created_at"]),
            ", ".join(f"{key} {value:.4g}" for key, value in head["figures"].items()) or "-",
        )
        for head in found["heads"]
    ]


def _homes(found: Sequence[Looked]) -> list[Sequence[Any]]:
    return [
        (
            one["name"],
            shown(one["text"]),
            _live(one) or None,
            one.get("waiting"),
            one.get("open_cases"),
            ", ".join(reason for reason in one.get("troubles", ()) if reason != "no_daemon") or None,
        )
        for one in found
    ]


def _live(one: Looked) -> str:
    return ", ".join(called(head["name"], head["live"]) for head in one.get("heads", ()))


def _daemon(found: Looked) -> str:
    daemon = found["daemon"]
    if daemon is None:
        return str(found["text"])
    where = f", at {daemon['url']}" if daemon["url"] else ""
    return f"{found['text']} (process {daemon['pid']} since {local(daemon['since'])}{where})"


def _flagged(experts: Sequence[Looked]) -> str:
    return ", ".join(f"{expert['name']} ({', '.join(expert['flags'])})" for expert in experts)
