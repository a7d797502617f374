"""What is asked at every poll, arrival, request and start costs the same over 1,000 experts and over 10,000.

SQLite's own steps are counted: one for each instruction of its virtual machine.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import event

from registry.engine import connect
from registry.reader import Reader
from registry.records import Status
from registry.store import Store
from tests.registry.many import Steps, fill
from tests.registry.samples import digest, expert, make, versions

FEW, MANY = 1_000, 10_000

Ask = Callable[[Reader], object]
ASKED: dict[str, Ask] = {
    "unplaced": lambda reader: reader.unplaced(),
    "merged_norms": lambda reader: reader.merged_norms(limit=200),
    "versions that are kept": lambda reader: reader.versions("main", include_collected=False),
    "versions": lambda reader: reader.versions("main", limit=100, before=900),
    "counts": lambda reader: reader.counts(),
    "an expert by its id": lambda reader: reader.find_experts("500"),
    "an expert by its sha256": lambda reader: reader.find_experts(digest(500)),
    "an expert by the beginning of its sha256": lambda reader: reader.find_experts(digest(500)[:12], 100),
    "an expert by its name": lambda reader: reader.find_experts("expert-500.safetensors"),
    "an expert by the name in its expert.json": lambda reader: reader.find_experts("task 500", 100),
    "an expert by a name that nobody has": lambda reader: reader.find_experts("nobody"),
    "a merged expert": lambda reader: reader.merged(digest(500)),
    "those without a content": lambda reader: reader.without_content(1.0005, 1.0006),
    "the lineage's first page": lambda reader: reader.lineage(limit=100),
    "a page of the lineage": lambda reader: reader.lineage(after=800, limit=100),
    "a page of what a version has": lambda reader: reader.experts_in(950, after=800, limit=100),
    "the newest experts": lambda reader: reader.experts(limit=100),
    "the newest that are merged": lambda reader: reader.experts(Status.MERGED, limit=100, before=900),
    "versions that may go": lambda reader: reader.unneeded(reader.heads()[0], 100),
    "a blocked expert": lambda reader: [reader.blocked(digest(500), digest(501))],
    "those that were refused and are open": lambda reader: reader.quarantined(limit=100, before=900),
    "an evaluation of these weights": lambda reader: [reader.evaluated(digest(500), digest(0))],
    "the newest interventions": lambda reader: reader.interventions(limit=100),
    "experts whose name begins so": lambda reader: reader.experts(name="expert-500.*"),
    "experts of a name": lambda reader: reader.experts(name="task 500"),
    "a name that every expert begins with": lambda reader: reader.search("expert-", 50),
    "how a sha256 begins": lambda reader: reader.search(digest(500)[:6], 50),
    "experts of versions": lambda reader: reader.experts_of(reader.versions("main", limit=50)),
    "heads": lambda reader: reader.heads(),
    "a version": lambda reader: reader.version("main", 500),
    "a version by its manifest": lambda reader: reader.version_of("main", digest(-500)[:40]),
}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(make(tmp_path_factory.mktemp("few") / "registry.sqlite"), FEW)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(make(tmp_path_factory.mktemp("many") / "registry.sqlite"), MANY)


def cost(path: Path, ask: Ask) -> int:
    with Reader.open(path) as reader, Steps() as steps:
        assert ask(reader) is not None
    return steps.taken


@pytest.mark.parametrize("what", ASKED)
def test_a_question_costs_no_more_over_many_experts(few: Path, many: Path, what: str) -> None:
    at_few, at_many = cost(few, ASKED[what]), cost(many, ASKED[what])
    assert 0 < at_many <= 1.1 * at_few + 50, f"{what}: {at_few} steps over {FEW} experts, {at_many} over {MANY}"


@pytest.mark.parametrize(
    ("index", "what"),
    [
        ("experts_unplaced", "unplaced"),
        ("experts_lineage", "merged_norms"),
        ("experts_lineage", "a page of the lineage"),
        ("experts_by_sha256", "an expert by its sha256"),
        ("experts_by_name", "an expert by its name"),
        ("experts_by_given_name", "an expert by the name in its expert.json"),
        ("versions_kept", "versions that are kept"),
        ("versions_by_manifest", "a version by its manifest"),
        ("evaluations_of_weights", "an evaluation of these weights"),
    ],
)
def test_without_its_index_it_would(few: Path, many: Path, tmp_path: Path, index: str, what: str) -> None:
    """The measure itself: what grows is seen to grow, and no index is there for nothing."""
    costs = []
    for path in (few, many):
        copy = Path(shutil.copy(path, tmp_path / path.parent.name))
        with closing(connect(copy, "rw")) as raw:
            raw.execute(f"DROP INDEX {index}")
        costs.append(cost(copy, ASKED[what]))
    assert costs[1] > 3 * costs[0]


@pytest.mark.parametrize("what", ASKED)
def test_no_plan_scans_a_table(many: Path, what: str) -> None:
    asked: list[tuple[str, tuple[object, ...]]] = []
    with Reader.open(many) as reader:

        @event.listens_for(reader._engine, "before_cursor_execute")
        def note(_: object, __: object, statement: str, parameters: tuple[object, ...], *___: object) -> None:
            asked.append((statement, parameters))

        ASKED[what](reader)
        event.remove(reader._engine, "before_cursor_execute", note)
        plans = []
        with reader._read() as connection:
            for statement, parameters in asked:
                if statement.startswith("SELECT"):
                    plans += [
                        row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                    ]
    assert plans
    scans = [plan for plan in plans if re.match(r"SCAN (experts|versions)\b", plan)]
    # the newest come by walking the primary key backwards, and a limit ends that; the partial index holds few
    allowed = {"SCAN experts USING INDEX experts_unplaced", *(["SCAN experts"] if what == "the newest experts" else [])}
    assert set(scans) <= allowed


def test_a_commit_costs_no_more_over_many_experts(few: Path, many: Path) -> None:
    taken = []
    for path in (few, many):
        with Store.open(path) as store, Steps() as steps:
            number = store.heads()[0].newest + 1
            merged = store.commit(expert(number, about={"name": f"task {number}"}), versions(number))
            store.placed(merged.id, "archive/1")
            store.record(expert(-number, Status.DUPLICATE, sha256=digest(number), duplicate_of=merged.id))
            store.collected("main", number - 1)
        taken.append(steps.taken)
    assert 0 < taken[1] <= 1.1 * taken[0] + 50, taken


def test_versions_that_experts_were_trained_from_are_not_looked_through(few: Path, many: Path, tmp_path: Path) -> None:
    costs = []
    for path in (few, many):
        copy = Path(shutil.copy(path, tmp_path / path.parent.name))
        with closing(connect(copy, "rw")) as raw:
            raw.execute("UPDATE versions SET collected = 0, trained = 1 WHERE collected = 1")
        costs.append(cost(copy, ASKED["versions that may go"]))
    assert costs[1] <= 1.1 * costs[0] + 50


def test_opening_reads_no_rows(few: Path, many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a daemon's start and `verify` look through all of it."""
    looked: list[str] = []
    monkeypatch.setattr("registry.reader.check", lambda *_: looked.append("all"))
    for path in (few, many):
        Reader.open(path).close()
        Store.open(path).close()
    assert looked == []
    with Store.open(many) as store:
        store.check()
    assert looked == ["all"]
