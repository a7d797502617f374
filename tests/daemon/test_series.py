"""How many series a daemon has: a bound by its heads, whatever the evaluator, the methods and those who ask make up."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase

from starlette.testclient import TestClient

from daemon.http import create_app
from daemon.layout import Home
from daemon.metrics import MOST_FIGURES, MOST_TASKS, Metrics
from registry.reader import Reader
from registry.records import Head, NewEvaluation, NewVersion, Score
from registry.store import Store
from tests.registry.many import Steps
from tests.registry.samples import BASE, digest, expert

DOCS = Path(__file__).parents[2] / "docs"
MOST, OF_A_HEAD = 1000, 55  # as docs/metrics.md says
SCORES = {f"{letter}{n}": Score(0.5, letter < "m") for letter in ascii_lowercase for n in range(4)}
FIGURES = {f"figure{n}": 0.5 for n in range(100)}


def home_with(root: Path, heads: int) -> Home:
    """A home of so many heads, each with a version that has many scores and figures."""
    home = Home(root)
    home.state.mkdir(parents=True)
    home.inbox.mkdir()
    made = [Head(f"head{n:02}", "mean", {}, 0, 0) for n in range(heads)]

    def versions(number: int, evaluation: int | None = None) -> list[NewVersion]:
        before = number - 1 if number else None
        more = {"totals": {}, "figures": FIGURES if number else {}, "evaluation": evaluation}
        return [NewVersion(head.name, number, before, digest(number), 500, **more) for head in made]

    Store.create(home.registry, BASE, made, versions(0))
    with Store.open(home.registry) as store:
        said = store.evaluate(NewEvaluation(digest(1), digest(0), SCORES, 1.0))
        store.commit(expert(1), versions(1, said.id))
    return home


@contextmanager
def scraped(home: Home) -> Iterator[tuple[Metrics, TestClient]]:
    """A daemon's metrics over that home, and its server."""
    metrics = Metrics()
    with Reader.open(home.registry) as reader:
        metrics.watch_disk(home.root)
        metrics.show_heads(reader)
        for head in reader.heads():
            metrics.prepared.labels(head.name).set(1)
        app = create_app(home, reader, metrics.registry, lambda: None, counting=metrics)
        with TestClient(app, follow_redirects=False) as client:
            yield metrics, client


def series(client: TestClient) -> list[str]:
    return [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]


def test_it_is_bounded_by_the_number_of_heads(tmp_path: Path) -> None:
    found = {}
    for heads in (1, 5, 20):
        with scraped(home_with(tmp_path / str(heads), heads)) as (_, client):
            found[heads] = len(series(client))
        assert found[heads] <= MOST + OF_A_HEAD * heads
    per_head = {(found[more] - found[fewer]) / (more - fewer) for fewer, more in ((1, 5), (5, 20))}
    assert per_head == {OF_A_HEAD} and OF_A_HEAD == 7 + MOST_TASKS + MOST_FIGURES


def test_nobody_who_asks_can_make_one(tmp_path: Path) -> None:
    with scraped(home_with(tmp_path / "home", 1)) as (_, client):
        addresses = [*(route.path for route in client.app.routes), "/{nothing}"]  # type: ignore[attr-defined]
        concrete = [re.sub(r"{[^}]*}", "7", address) for address in addresses if "events" not in address]  # it ends not
        for method in ("GET", "HEAD", "POST", "OTHER"):
            for address in concrete:
                client.request(method, address)

        def made_up(n: int) -> None:
            client.request(f"METHOD{n}", f"/{n}", headers={"Host": f"host{n}", "User-Agent": f"agent{n}"})
            client.get(f"/v1/heads/head{n}/versions/{n}/files/{n}/{n}?n={n}")
            client.get(f"/v1/experts/{n:08x}")

        made_up(0)
        before = series(client)
        assert len(before) <= MOST + OF_A_HEAD
        for n in range(100, 200):
            made_up(n)
        assert len(series(client)) == len(before)


def test_a_scrape_asks_as_much_of_a_home_that_is_old(tmp_path: Path) -> None:
    taken = []
    for merged in (10, 60):
        home = home_with(tmp_path / str(merged), 2)
        with Store.open(home.registry) as store:
            for number in range(2, merged + 1):
                rows = [
                    NewVersion(head.name, number, number - 1, digest(number), 500, {}, {}) for head in store.heads()
                ]
                store.placed(store.commit(expert(number), rows).id, "archive")
                for head in store.heads():
                    if number > 6:
                        store.collected(head.name, number - 5)
        with scraped(home) as (_, client):
            series(client)
            with Steps() as steps:
                series(client)
        taken.append(steps.taken)
    assert taken[1] <= taken[0] * 1.2


def test_the_bound_is_the_one_that_the_docs_state() -> None:
    said = re.search(
        r"at most ([\d,]+) series, and (\d+) for each head", " ".join((DOCS / "metrics.md").read_text().split())
    )
    assert said and (int(said[1].replace(",", "")), int(said[2])) == (MOST, OF_A_HEAD)
