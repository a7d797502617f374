"""What the verbs share by which a person changes a home: each asks nothing twice, and says what it did.

A dry run says what would be done; a reason is kept with who and when.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.common import HomeOption, JsonOption, open_reader, print_json
from daemon.errors import BadHome
from registry.records import Deed, Expert, Status

if TYPE_CHECKING:
    from pathlib import Path

    from registry.reader import Reader
    from registry.records import Version

ReasonOption = Annotated[str | None, typer.Option("--reason", help="Why: kept with who did it and when.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
VersionArgument = Annotated[
    str, typer.Argument(metavar="VERSION", help="A version: HEAD/N, as main/12, or N.", show_default=False)
]
HeadOption = Annotated[str | None, typer.Option(help="The head, where VERSION does not name it: main at first.")]
ExpertArgument = Annotated[
    list[str], typer.Argument(metavar="ID", help="An expert: its id, sha256 or name.", show_default=False)
]


def on_version(deed: Deed, words: str) -> Callable[..., None]:
    """The verb that does this to a version; `words` are its help."""

    def command(
        version: VersionArgument,
        head: HeadOption = None,
        reason: ReasonOption = None,
        dry_run: DryRunOption = False,
        home: HomeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        intervene(deed, home, reason, dry_run, version=version, head=head, as_json=as_json)

    command.__doc__ = words
    return command


def on_experts(deed: Deed, words: str) -> Callable[..., None]:
    """The verb that does this to experts; `words` are its help."""

    def command(
        experts: ExpertArgument,
        reason: ReasonOption = None,
        dry_run: DryRunOption = False,
        home: HomeOption = None,
        as_json: JsonOption = False,
    ) -> None:
        intervene(deed, home, reason, dry_run, experts=experts, as_json=as_json)

    command.__doc__ = words
    return command


def intervene(
    deed: Deed,
    option: "Path | None",
    why: str | None,
    dry_run: bool,
    *,
    version: str | None = None,
    head: str | None = None,
    experts: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Does it, or says what it would do."""
    from daemon.interventions.deeds import MOST_LETTERS, Request, check, whoever
    from daemon.interventions.requests import ask

    if why is not None and (not why.strip() or len(why) > MOST_LETTERS):
        raise typer.BadParameter(f"1 to {MOST_LETTERS} letters", param_hint="--reason")
    home, reader = open_reader(None, option)
    with reader:
        meant = version_named(reader, version, head) if version is not None else None
        ids = tuple(expert_named(reader, word, deed).id for word in experts)
        named, number = (meant.head, meant.number) if meant else (None, None)
        request = Request(deed, whoever(), why, named, number, ids)
        planned = check(home, reader, request)
    lines = planned if dry_run else ask(home, request, say=meanwhile(as_json))
    tell(deed, lines, dry_run, as_json)


def meanwhile(as_json: bool) -> Callable[[str], None]:
    """Where it is printed what is waited for: not among JSON."""
    return partial(typer.echo, err=as_json)


def tell(
    deed: Deed,
    lines: Sequence[str],
    dry_run: bool,
    as_json: bool,
    nothing: str = "nothing is to be done: it is so already",
    would: str = "nothing was done; it would be so:",
) -> None:
    """Prints what was done, in lines of words, or would be; `nothing` where there are none."""
    if as_json:
        print_json({"deed": str(deed), "changed": bool(lines) and not dry_run, "told": list(lines)})
        return
    typer.echo("\n".join([would, *lines] if dry_run and lines and would else lines) or nothing)


def version_named(reader: "Reader", words: str, head: str | None) -> "Version":
    """The version that is meant: by HEAD/N, or by N and the option. Raises DaemonError where there is none."""
    from daemon.notation import find_version, read_name

    named = read_name(words)
    if head is not None:
        if named and named.head not in (None, head):
            raise typer.BadParameter(f"{words} is of another head than {head}", param_hint="--head")
        words = f"{head}/{words.rpartition('/')[2]}"
    return find_version(reader, words)


def expert_named(reader: "Reader", word: str, deed: Deed) -> Expert:
    """The one expert that is meant; where many have one name, the newest that the deed fits."""
    from daemon.notation import told_apart

    found = reader.find_experts(word, 100)
    open_cases = [one for one in found if one.status is Status.QUARANTINED and not one.closed_at]
    blocked = [one for one in found if one.blocked]
    fitting = {Deed.RETRY: open_cases, Deed.DISCARD: open_cases, Deed.UNBLOCK: blocked}.get(deed, found)
    if len(fitting or found) != 1:
        what = f"{len(fitting or found)} experts are called {word!r}: {told_apart(fitting or found)}"
        raise BadHome(
            what if found else f"no expert is called {word!r}",
            "give the id; `mainstem log` lists them, `mainstem quarantine list` the open cases",
        )
    return (fitting or found)[0]
