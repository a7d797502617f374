"""`mainstem webhooks`: who is told of events, by webhooks and hooks, and what of it was not told."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.asking import meanwhile, tell
from daemon.cli.common import (
    HomeOption,
    JsonOption,
    complain,
    find_home,
    local,
    open_reader,
    print_json,
    print_table,
    settings_of,
)
from registry.records import Deed, Outcome

if TYPE_CHECKING:
    from registry.records import Delivery

app = typer.Typer(no_args_is_help=True, help="Look after webhooks and hooks.", rich_markup_mode=None)


@app.command("list")
def listing(
    dead: Annotated[bool, typer.Option("--dead", help="Only what was given up.")] = False,
    limit: Annotated[int, typer.Option(help="How many deliveries, newest first.", min=1, max=100_000)] = 20,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """List who is told, and what each was told or is still to be told."""
    _, reader = open_reader(None, home)
    with reader:
        endpoints, pending = reader.endpoints(), reader.count_undelivered()
        found = reader.deliveries(limit, outcome=Outcome.DEAD if dead else None)
    if as_json:
        counts = {"pending": pending[0], "dead": pending[1]}
        print_json({"endpoints": [asdict(one) for one in endpoints], "deliveries": list(map(asdict, found)), **counts})
        return
    print_table(
        ("endpoint", "kind", "told of", "since", "dropped", "target"),
        ((e.id, e.kind, ", ".join(e.events), local(e.since), e.dropped, e.target) for e in endpoints),
    )
    typer.echo(f"\n{pending[0]} deliveries are pending, {pending[1]} were given up")
    if found:
        print_table(
            ("id", "endpoint", "event", "about", "happened", "outcome", "tries", "next", "answer"),
            (
                (d.id, d.endpoint, d.event, _about(d), local(d.at), d.outcome, d.attempts, local(d.next_at), d.answer)
                for d in found
            ),
        )
    if len(found) == limit:
        typer.echo(f"these are the newest {limit}: --limit N lists more")


@app.command()
def redeliver(
    ids: Annotated[list[int] | None, typer.Argument(metavar="ID", help="Deliveries.", show_default=False)] = None,
    all_dead: Annotated[bool, typer.Option("--all-dead", help="All that were given up.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Have it told once more, by the same webhook-id."""
    from daemon.interventions.deeds import Request, whoever
    from daemon.interventions.requests import ask

    if bool(ids) == all_dead:
        raise typer.BadParameter("name deliveries, or say --all-dead", param_hint="ID")
    request = Request(Deed.REDELIVER, whoever(), deliveries=tuple(ids or ()))
    lines = ask(find_home(None, home), request, say=meanwhile(as_json))
    tell(Deed.REDELIVER, lines, False, as_json, "nothing was given up")


@app.command("test")
def trial(
    url: Annotated[
        str | None, typer.Argument(help="Only the webhook with that URL.", metavar="[URL]", show_default=False)
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send every webhook of the settings a message of the type `test`, now and from here; exit status 1 where one does
    not take it."""
    from datetime import UTC, datetime

    from daemon.outbox.posting import Posting
    from registry.outbox import message

    where = find_home(None, home)
    webhooks = [one for one in settings_of(where).webhooks if url in (None, one.url)]
    if not webhooks:
        complain("mainstem.toml has no such webhook", "[[webhooks]] with a url: docs/hooks.md")
        raise typer.Exit(1)
    content = {"type": "test", "timestamp": datetime.now(UTC).isoformat(), "data": {"home": str(where.root)}}
    found = []
    for webhook in webhooks:
        answer = Posting(where, webhook, webhook.secrets(where.root)).say(message(), content)
        found.append({"url": webhook.url, "delivered": answer.delivered, "answer": answer.text})
    if as_json:
        print_json(found)
    else:
        for one in found:
            typer.echo(f"{'told' if one['delivered'] else 'not told'}: {one['url']}: {one['answer']}")
    if not all(one["delivered"] for one in found):
        raise typer.Exit(1)


def _about(delivery: "Delivery") -> str:
    data = delivery.data
    if data.get("version") is not None:
        return f"{data['head']}/{data['version']}"
    return str(data.get("expert") or data.get("reason"))
