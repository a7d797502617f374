"""A start, a poll, an arrival, a command and a request cost the same over 1,000 merged experts and over 10,000.

The steps of SQLite's virtual machine are counted, and the folders that are listed.
"""

import json
import os
import shutil
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient
from typer.testing import CliRunner

from daemon.cli.app import app as command_line
from daemon.home.verification import _every
from daemon.http import create_app
from daemon.http.files import Published
from daemon.http.pages.routes import PageRoutes
from daemon.layout import Home
from daemon.rebuild.replay import pages
from daemon.versions.retention import collect
from registry.reader import Reader
from registry.records import Status
from registry.store import Store
from tests.daemon.homes import drain, experts, make_home, put, quick
from tests.models import write_expert
from tests.registry.many import Steps, fill
from tests.registry.samples import digest

FEW, MANY = 1_000, 10_000
HEADS = [("main", "opcm", {}), ("own", "emr", {})]

COMMANDS = {
    "status": ("status",),
    "log": ("log", "--limit", "100"),
    "log of versions": ("log", "--versions", "--limit", "100"),
    "log of interventions": ("log", "--interventions"),
    "log of a status": ("log", "--status", "merged"),
    "show by id": ("show", "500"),
    "show by sha256": ("show", digest(500)[:16]),
    "show by name": ("show", "expert-500.safetensors"),
    "show a version": ("show", "v500"),
    "config check": ("config", "check"),
    "compare": ("compare", "main/0", "main"),
}
ADDRESSES = {
    "/": "/",
    "/livez": "/livez",
    "/readyz": "/readyz",
    "/metrics": "/metrics",
    "/v1/heads": "/v1/heads",
    "/v1/heads/{head}/latest": "/v1/heads/main/latest",
    "/v1/heads/{head}/latest/files/{name:path}": "/v1/heads/main/latest/files/model.safetensors",
    "/v1/heads/{head}/versions": "/v1/heads/main/versions?before=900",
    "/v1/heads/{head}/versions/{n}/data": "/v1/heads/main/versions/{live}/data",
    "/v1/heads/{head}/versions/{n}": "/v1/heads/main/versions/{live}",
    "/v1/heads/{head}/versions/{n}/files/{name:path}": "/v1/heads/main/versions/{live}/files/model.safetensors",
    "/v1/heads/{head}/versions/{n}/views/{expert}/files/{name:path}": (
        "/v1/heads/own/versions/{live}/views/{live}/files/model.safetensors"
    ),
    "/v1/experts": "/v1/experts?before=900",
    "/v1/experts/{sha256}": f"/v1/experts/{digest(500)}",
    "/v1/lineage": "/v1/lineage",
    "/api/models": "/api/models?author=mainstem",
    "/api/models/mainstem/{repo}": "/api/models/mainstem/main",
    "/api/models/mainstem/{repo}/auth-check": "/api/models/mainstem/main/auth-check",
    "/api/models/mainstem/{repo}/revision/{revision:revision}": "/api/models/mainstem/main/revision/{commit}",
    "/api/models/mainstem/{repo}/tree/{revision:revision}": "/api/models/mainstem/main/tree/main",
    "/api/models/mainstem/{repo}/tree/{revision:revision}/{folder:path}": "/api/models/mainstem/main/tree/v{live}/",
    "/api/models/mainstem/{repo}/refs": "/api/models/mainstem/main/refs",
    "/mainstem/{repo}/resolve/{revision:revision}/{name:path}": "/mainstem/main/resolve/{commit}/model.safetensors",
    "/v2/": "/v2/",
    "/v2/mainstem/{repo}/tags/list": "/v2/mainstem/main/tags/list",
    "/v2/mainstem/{repo}/manifests/{reference}": "/v2/mainstem/main/manifests/v{live}",
    "/v2/mainstem/{repo}/blobs/{digest}": "/v2/mainstem/main/blobs/sha256:{weights}",
    "/v1/events": "/v1/events",
    "/lineage": "/lineage?before=900",
    "/experts": "/experts?q=expert-",
    "/experts/{id}": "/experts/500",
    "/heads/{head}/versions/{n}": "/heads/main/versions/{live}",
}
NOT_GET = {"/api/models/mainstem/{repo}/paths-info/{revision:revision}"}
NOTHING = {  # 404, whatever is asked
    "/api/models/mainstem/{repo}/{rest:path}",
    "/api/repos/{rest:path}",
    "/api/models/{repo:path}",
    "/api/datasets/{repo:path}",
    "/api/spaces/{repo:path}",
    "/{repo:path}/resolve/{rest:path}",
    "/v2/{rest:path}",
}
BY_NAME = {"an expert by its name": "/v1/experts/expert-500.safetensors"}


@pytest.fixture(scope="module")
def crowded(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Home]:
    """Homes with so many merged experts, by the number: all but the newest of each are rows and empty folders."""
    folder = tmp_path_factory.mktemp("crowded")
    one = make_home(folder / "one", base, HEADS)
    put(one, write_expert(folder / "e.safetensors", base, 2))
    drain(one)
    return {n: crowd(Home(Path(shutil.copytree(one.root, folder / str(n), symlinks=True))), n) for n in (FEW, MANY)}


def crowd(home: Home, newest: int) -> Home:
    """Makes of version 1 of a home, and of its expert, those with the number `newest`, after as many others."""
    with closing(sqlite3.connect(home.registry, isolation_level=None)) as raw:
        kept = raw.execute("SELECT head, manifest_sha256, totals FROM versions WHERE number = 1").fetchall()
        raw.execute("DELETE FROM versions WHERE number = 1")
        raw.execute("DELETE FROM experts")
    fill(home.registry, newest)
    with closing(sqlite3.connect(home.registry, isolation_level=None)) as raw:
        raw.execute("UPDATE versions SET collected = number NOT IN (0, ?)", (newest,))
        for head, manifest, totals in kept:
            row = manifest, totals, head, newest
            raw.execute("UPDATE versions SET manifest_sha256 = ?, totals = ? WHERE head = ? AND number = ?", row)
    for head in ("main", "own"):
        home.version(head, 1).rename(home.version(head, newest))
        home.head_state(head, 1).rename(home.head_state(head, newest))
    home.view_record("own", 1).rename(home.view_record("own", newest))
    for n in range(1, newest):
        home.view_record("own", n).touch()
        home.archive(n).mkdir(exist_ok=True)
        home.quarantine(n).mkdir(parents=True, exist_ok=True)
    drain(home)  # what a first start puts right
    return home


@contextmanager
def listed() -> Iterator[list[str]]:
    """The folders that this process lists meanwhile."""
    found: list[str] = []
    on = True

    def hear(what: str, arguments: tuple[object, ...]) -> None:
        if on and what in ("os.listdir", "os.scandir") and isinstance(arguments[0], str | os.PathLike):
            found.append(os.fspath(arguments[0]))

    sys.addaudithook(hear)  # for ever: there is no way to take one back
    try:
        yield found
    finally:
        on = False


def no_crowd(home: Home, folders: list[str], looks: int = 0) -> None:
    """Asserts that those with an entry for every expert are listed exactly so often."""
    crowds = (home.root / "archive", home.root / "quarantine", home.views("own"))
    times = Counter(map(Path, folders))
    assert all(times[folder] == looks for folder in crowds), times


def alike(what: str, counted: dict[int, Steps]) -> None:
    few, many = counted[FEW], counted[MANY]
    assert 0 < many.taken <= 1.1 * few.taken + 100, f"{what}: {few.taken} steps, {many.taken}"
    assert many.statements == few.statements


@pytest.mark.parametrize("arrives", ["nothing", "an expert", "a duplicate", "a wrong one"])
def test_a_start_a_poll_and_an_arrival(
    crowded: dict[int, Home], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arrives: str
) -> None:
    counted = {}
    for n, home in crowded.items():
        if arrives == "an expert":
            put(home, write_expert(tmp_path / "e.safetensors", base, 3))
        if arrives == "a duplicate":
            put(home, write_expert(tmp_path / "e.safetensors", base, 3))
        if arrives == "a wrong one":
            (home.inbox / "e.safetensors").write_bytes(b"no model" * 100)
        with Steps() as steps, listed() as folders:
            drain(home, quick(retention={"versions": 1, "grace_seconds": 0}))
        counted[n] = steps
        no_crowd(home, folders, looks=1)  # a start looks for what the registry does not know: by names, once
        assert folders, "nothing was heard of"
    alike(arrives, counted)
    wanted = {"an expert": Status.MERGED, "a duplicate": Status.DUPLICATE, "a wrong one": Status.QUARANTINED}
    if arrives in wanted:
        assert experts(crowded[MANY])[-1].status is wanted[arrives]


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS.keys())
def test_a_command(crowded: dict[int, Home], words: tuple[str, ...]) -> None:
    counted = {}
    for n, home in crowded.items():
        with Steps() as steps, listed() as folders:
            ended = CliRunner().invoke(command_line, [*words, "--home", str(home.root)], catch_exceptions=False)
        assert ended.exit_code == 0, ended.output
        counted[n] = steps
        no_crowd(home, folders)
    alike(words[0], counted)


@pytest.mark.parametrize("route", [*ADDRESSES, *BY_NAME])
def test_a_request(crowded: dict[int, Home], route: str) -> None:
    counted = {}
    for n, home in crowded.items():
        with Reader.open(home.registry) as reader:
            app = create_app(home, reader, CollectorRegistry(), lambda: None)
            assert {one.path for one in app.routes} == set(ADDRESSES) | NOT_GET | NOTHING  # type: ignore[attr-defined]
            version = reader.version("main", reader.heads()[0].live)
            assert version
            weights = sha256((home.version("main", version.number) / "model.safetensors").read_bytes()).hexdigest()
            address = (ADDRESSES | BY_NAME)[route].format(
                live=version.number, commit=version.manifest_sha256[:40], weights=weights
            )
            with TestClient(app, follow_redirects=False) as client, Steps() as steps, listed() as folders:
                if route == "/v1/events":  # the answer has no end: one look, of which it is made
                    assert PageRoutes(Published(home, reader), list).told().events
                else:
                    assert client.get(address).status_code in (200, 307), address
        counted[n] = steps
        no_crowd(home, folders)
    if route not in ("/livez", "/readyz", "/metrics", "/v2/"):  # these ask nothing
        alike(route, counted)


def test_long_lists_are_read_in_pages(crowded: dict[int, Home], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.rebuild.replay.PAGE", 300)
    monkeypatch.setattr("daemon.home.verification.PAGE", 300)
    with Reader.open(crowded[FEW].registry) as reader:
        assert list(pages(reader)) == reader.lineage() != []
        assert list(_every(reader)) == reader.experts(limit=-1)


def test_show_prints_a_bounded_number_of_namesakes(crowded: dict[int, Home]) -> None:
    home = crowded[FEW]
    with closing(sqlite3.connect(home.registry)) as raw, raw:
        raw.execute("UPDATE experts SET name = 'model' WHERE id > 10 AND id < 400")
    ended = CliRunner().invoke(command_line, ["show", "model", "--json", "--home", str(home.root)])
    found = json.loads(ended.stdout)
    assert [one["id"] for one in found] == list(range(399, 299, -1)) and "more than 100" in ended.stderr


def test_collecting_among_versions_that_are_all_within_the_grace_time(crowded: dict[int, Home]) -> None:
    counted = {}
    for n, home in crowded.items():
        with closing(sqlite3.connect(home.registry)) as raw, raw:
            raw.execute("UPDATE versions SET collected = 0, created_at = datetime('now')")
        with Store.open(home.registry) as store, Steps() as steps:
            assert collect(home, store, quick().retention) == []
        counted[n] = steps
    alike("collect", counted)
    with closing(sqlite3.connect(home.registry)) as raw, raw:  # more than are looked at together
        raw.execute("UPDATE versions SET collected = number BETWEEN 1 AND (SELECT newest FROM heads) - 130")
    with Store.open(home.registry) as store:
        gone = collect(home, store, quick(retention={"versions": 5, "grace_seconds": 0}).retention)
        live = store.heads()[0].live
        assert len(gone) == 2 * 125
        assert [one.number for one in store.versions("own", include_collected=False)] == [*range(live, live - 5, -1), 0]
