"""`mainstem webhooks`: who is told, what was not, and having it told again."""

import json
from dataclasses import replace

import pytest

from daemon.layout import Home
from registry.records import EndpointKind, Event, Happening, NewEndpoint, Outcome
from registry.store import Store
from tests.daemon.outbox.receiver import SECRET, receiving, verified
from tests.daemon.processes import forked, forked_each

URL = "https://example.com/told"


@pytest.fixture
def told(home: Home) -> Home:
    """A home with an endpoint and three deliveries: one made, one given up, one pending."""
    with Store.open(home.registry) as store:
        store.follow_endpoints([NewEndpoint(EndpointKind.WEBHOOK, URL, tuple(Event))])
        for number in range(3):
            store.announce(Happening(Event.PUBLISHED, {"head": "main", "version": number}))
        made, dead, _ = store.pending(1, 10)
        store.note_deliveries([replace(made, outcome=Outcome.DELIVERED), replace(dead, outcome=Outcome.DEAD)])
    return home


def test_what_was_given_up_is_listed_and_told_again(told: Home) -> None:
    at = ("--home", told.root)
    listed, dead, plain, again, nothing, by_id, wrong, unsaid = forked_each(
        [
            ("webhooks", "list", "--json", *at),
            ("webhooks", "list", "--dead", "--json", *at),
            ("webhooks", "list", *at),
            ("webhooks", "redeliver", "--all-dead", *at),
            ("webhooks", "redeliver", "--all-dead", *at),
            ("webhooks", "redeliver", "1", *at),
            ("webhooks", "redeliver", "99", *at),
            ("webhooks", "redeliver", *at),
        ]
    )
    found = json.loads(listed.stdout)
    assert [one["target"] for one in found["endpoints"]] == [URL]
    assert [one["outcome"] for one in found["deliveries"]] == ["pending", "dead", "delivered"]
    assert (found["pending"], found["dead"]) == (1, 1)
    assert [one["id"] for one in json.loads(dead.stdout)["deliveries"]] == [2]
    assert URL in plain.stdout and "main/1" in plain.stdout and "1 were given up" in plain.stdout
    assert again.stdout.startswith("1 is told again") and nothing.stdout == "nothing was given up\n"
    assert by_id.returncode == 0
    assert wrong.returncode == 1 and "there is no delivery 99" in wrong.stderr
    assert unsaid.returncode == 2
    with Store.open(told.registry) as store:
        assert [one.id for one in store.pending(1, 10)] == [1, 2, 3]
        assert store.interventions() == []


def test_each_webhook_is_tried_from_here(home: Home) -> None:
    with receiving() as good, receiving() as bad:
        bad.answer = lambda _: (403, "who are you?")
        tables = "".join(
            f'[[webhooks]]\nurl = "{one.url}"\nsecret_file = "secret"\nallow_private = true\n' for one in (good, bad)
        )
        home.config.write_text(tables)
        missing = forked("webhooks", "test", "--home", home.root)
        assert missing.returncode == 1 and "urandom" in missing.stderr
        (home.root / "secret").write_text(SECRET + "\n")
        done, one = forked_each(
            [("webhooks", "test", "--home", home.root), ("webhooks", "test", good.url, "--json", "--home", home.root)]
        )
        assert done.returncode == 1 and f"not told: {bad.url}: 403 Forbidden: who are you?" in done.stdout
        assert one.returncode == 0 and json.loads(one.stdout)[0]["delivered"]
        assert [request.said["type"] for request in good.wait(2)] == ["test", "test"]
        assert verified(good.requests[0], b"0123456789abcdef" * 2)


def test_the_settings_are_checked_and_shown_without_the_secret(home: Home) -> None:
    home.config.write_text(f'[[webhooks]]\nurl = "{URL}"\nsecret = "whsec_short"\n')
    wrong = forked("config", "check", "--home", home.root)
    assert wrong.returncode == 1 and f"the secret of webhook {URL}" in wrong.stderr
    hook = '[hooks]\npublished = ["/no/such/program", "{folder}"]\n'
    home.config.write_text(hook)
    missing = forked("config", "check", "--home", home.root)
    assert missing.returncode == 1 and "hooks.published: there is no file /no/such/program" in missing.stderr
    hook = hook.replace("/no/such/program", "true")
    home.config.write_text(f'{hook}[[webhooks]]\nurl = "{URL}"\nsecret = "{SECRET}"\n')
    checked, shown, as_json = forked_each(
        [
            (*words, "--home", home.root)
            for words in (("config", "check"), ("config", "show"), ("config", "show", "--json"))
        ]
    )
    assert checked.returncode == 0, checked.stderr
    assert URL in shown.stdout and "where each event is sent" in shown.stdout
    assert json.loads(as_json.stdout)["webhooks.0.url"] == URL
    assert not any(SECRET in text for text in (shown.stdout, as_json.stdout, checked.stdout))
