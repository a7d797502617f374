"""What needs a person: each with its reason, and with the command that ends it; for the page, and whoever else shows
it.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

from daemon.home.condition import NONE, Condition
from daemon.home.presence import Doing
from daemon.home.standing import back, held
from daemon.layout import Home
from daemon.notation import called
from registry.reader import Reader

CASES = 5  # of quarantine, and entries of the inbox, that are named each
LONG = timedelta(minutes=10)  # since when an entry that is not complete lies there
_COMMAND = re.compile(r"`(mainstem [^`<>]+)`")
_ONE = re.compile(r"mainstem .+?(?= && |$)")  # command of several in a line


@dataclass(frozen=True, slots=True)
class Matter:
    """One thing that needs a person.

    kind: trouble, paused, held, incomplete, undelivered or refused. text: what it is, and why. hint: what to do, as far
    as no command says it. commands: any of them ends it. expert: the id of the one that it is about.
    """

    kind: str
    text: str
    hint: str | None = None
    commands: Sequence[str] = ()
    expert: int | None = None


def at_home(command: str, home: str) -> str:
    """A command of ours, or several, over the home that lies there.

    >>> at_home("mainstem unblock 5 && mainstem quarantine retry 5", "chat")
    'mainstem unblock 5 --home chat && mainstem quarantine retry 5 --home chat'
    """
    return _ONE.sub(lambda found: f"{found[0]} --home {shlex.quote(home)}", command)


def attention(now: Condition, reader: Reader, home: Home, path: str) -> list[Matter]:
    """All that needs a person, what is worst first. path: of the home, as the commands are to name it."""
    found = _matters(now, reader, home, path)
    return [replace(one, commands=[at_home(command, path) for command in one.commands]) for one in found]


def _matters(now: Condition, reader: Reader, home: Home, path: str) -> list[Matter]:
    found = [_trouble(one.text, one.hint) for one in now.troubles]
    if now.doing == NONE and all(one.reason != "no_daemon" for one in now.troubles):
        found.append(_trouble("no daemon runs on this home: nothing is merged", "start `mainstem run`"))
    if now.doing == Doing.PAUSED:
        found.append(Matter("paused", now.text, commands=("mainstem resume",)))
    for head in reader.heads():
        if stays := held(home, reader, head):
            nor = ", nor will the next be" if stays.frozen else ""
            text = f"{called(head.name, stays.version)}, the newest, is not live{nor}: {stays.why}"
            found.append(Matter("held", text, commands=(stays.command,)))
    return found + _incomplete(now, path) + _undelivered(reader) + _refused(reader)


def _trouble(text: str, hint: str) -> Matter:
    return Matter("trouble", text, hint, tuple(_COMMAND.findall(hint)))


def _incomplete(now: Condition, home: str) -> list[Matter]:
    """Entries that were looked at, not taken, and have lain there for long."""
    looked = now.daemon.waiting if now.daemon else {}
    since = datetime.now(UTC) - LONG
    late = [one for one in now.waiting or () if one.name in looked and one.since and one.since < since]
    found = [
        Matter(
            "incomplete",
            f"{one.name} waits in the inbox: {one.why}",
            commands=(f"mainstem inspect {shlex.quote(f'{home}/inbox/{one.name}')}",),
        )
        for one in late[:CASES]
    ]
    if len(late) > CASES:
        text = f"{len(late) - CASES} more wait in the inbox for long"
        found.append(Matter("incomplete", text, commands=("mainstem status",)))
    return found


def _undelivered(reader: Reader) -> list[Matter]:
    """What webhooks and hooks were not told, and will not be by itself."""
    _, dead = reader.count_undelivered()
    if not dead:
        return []
    text = f"webhooks and hooks were not told, for hours, of {dead} {'event' if dead == 1 else 'events'}: given up"
    commands = ("mainstem webhooks redeliver --all-dead",)
    return [Matter("undelivered", text, "`mainstem webhooks list` says what their receivers answered", commands)]


def _refused(reader: Reader) -> list[Matter]:
    """The newest open cases of quarantine, and how many more there are."""
    found = [
        Matter(
            "refused",
            f"{one.name} was refused ({one.reason}): {one.detail or one.reason}",
            one.hint,
            (" && ".join(back(one.id, blocked=one.blocked)), f"mainstem quarantine discard {one.id}"),
            one.id,
        )
        for one in reader.quarantined(limit=CASES)
    ]
    more = reader.count_open() - len(found)
    if more > 0:
        text = f"{more} more {'case' if more == 1 else 'cases'} of quarantine {'is' if more == 1 else 'are'} open"
        found.append(Matter("refused", text, commands=("mainstem quarantine list",)))
    return found
