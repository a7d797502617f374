"""`mainstem report` over a real home: what it reads from the registry and from the archive is what is there."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from daemon.layout import Home
from daemon.reports.report.gathering import gather
from daemon.reports.report.overlaps import overlap
from registry.reader import Reader
from registry.records import NewEvaluation, Score, Scores
from registry.store import Store
from tests.daemon.homes import drain, lineage, make_home, put
from tests.daemon.processes import forked
from tests.models import read_weights, write_base, write_expert
from tests.registry.many import Steps, fill
from tests.registry.samples import make

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
TASKS = ("reading", "mathematics", "law")


def described(folder: Path, weights: Path, task: str) -> Path:
    """An expert as a folder, with an expert.json that names its task."""
    folder.mkdir()
    shutil.move(weights, folder / "model.safetensors")
    (folder / "expert.json").write_text(json.dumps({"name": f"the {task} one", "task": task}))
    return folder


def scored(store: Store, scores: Scores) -> int:
    return store.evaluate(NewEvaluation("ab" * 32, "cd" * 32, scores, seconds=1.0)).id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Path]:
    """A home with two heads and three experts, of which main's versions 0, 1 and 3 and the experts were scored."""
    root = tmp_path_factory.mktemp("report")
    base = write_base(root / "base.safetensors", seed=1)
    home = make_home(root / "home", base, [("main", "opcm", {}), ("soup", "mean", {})])
    for seed, task in enumerate(TASKS, start=2):
        put(home, described(root / task, write_expert(root / "e.safetensors", base, seed, scale=0.01 * seed), task))
        drain(home)
    with Store.open(home.registry) as store:
        for number, values in {0: (0.5, 0.4, 0.3), 1: (0.9, 0.4, 0.3), 3: (0.7, 0.8, 0.75)}.items():
            scores = {task: Score(value) for task, value in zip(TASKS, values, strict=True)}
            store.judge_version("main", number, scored(store, {**scores, "zero": Score(0.6, held_out=True)}))
        for expert in store.experts():
            task = (expert.about or {})["task"]
            store.judge_expert(expert.id, scored(store, {task: Score(0.95), "zero": Score(0.5, held_out=True)}))
    return home, base


def difference(model: Path, base: Path) -> dict[str, Tensor]:
    start = read_weights(base)
    return {n: w.double() - start[n].double() for n, w in read_weights(model).items() if w.is_floating_point()}


def cosine(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    def dot(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
        return sum(float((x[name] * y[name]).sum()) for name in x)

    return dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5


def test_it_is_what_the_registry_says(made: tuple[Home, Path]) -> None:
    with lineage(made[0]) as reader:
        report = gather(reader, NOON)
    main, soup = report.heads
    assert [arrival.number for arrival in main.arrivals] == [0, 1, 2, 3]
    assert [arrival.task for arrival in main.arrivals] == [None, *TASKS]
    assert main.arrivals[1].expert == "the reading one" and (main.arrivals[1].norm or 0) > 0
    assert main.arrivals[3].figures["lambda"] > 0 and main.arrivals[3].seconds and main.arrivals[3].published_bytes
    assert {task: score.score for task, score in report.own.items()} == dict.fromkeys(TASKS, 0.95)
    found = main.found
    assert found is not None and found.number == 3
    assert found.acc == pytest.approx((0.7 + 0.8 + 0.75) / 3)
    assert found.bwt == pytest.approx(0.7 - 0.9) and found.bwt_tasks == 1, "version 2 was not scored"
    assert found.retention == 0.6 and found.held_in_gain == pytest.approx(1.05 / 3)
    assert found.normalised == pytest.approx({"reading": 0.7 / 0.95, "mathematics": 0.8 / 0.95, "law": 0.75 / 0.95})
    assert soup.base == main.base, "version 0 of every head is the base"


def test_an_expert_that_was_taken_out_was_not_learned(made: tuple[Home, Path]) -> None:
    with lineage(made[0]) as reader:
        main = gather(reader, NOON).heads[0]
    gone = replace(main, arrivals=[replace(a, withdrawn=a.number == 2) for a in main.arrivals]).figured({})
    assert gone.found is not None and gone.found.learned == ["reading", "law"]
    assert gone.found.acc == pytest.approx((0.7 + 0.75) / 2)


def test_a_window_leaves_out_what_is_older(made: tuple[Home, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    plain = Reader.expert
    monkeypatch.setattr(Reader, "expert", lambda self, key: asked.append(key) or plain(self, key))  # type: ignore[func-returns-value]
    with lineage(made[0]) as reader:
        report = gather(reader, NOON, window=2)
    main = report.heads[0]
    assert [arrival.number for arrival in main.arrivals] == [2, 3] and not main.whole
    assert asked == [2, 3], "each expert is read once, whatever the number of heads"
    assert main.versions[0].number == 0 and main.versions[0].scores["reading"].score == 0.5
    assert main.found is not None and main.found.acc == pytest.approx((0.8 + 0.75) / 2)


def test_it_asks_no_more_of_a_registry_with_ten_times_the_experts(tmp_path: Path) -> None:
    taken = []
    for merged in (200, 2000):
        path = fill(make(tmp_path / f"{merged}.sqlite"), merged)
        with Reader.open(path) as reader, Steps() as steps:
            report = gather(reader, NOON, window=50)
        assert [len(head.arrivals) for head in report.heads] == [50] * len(report.heads)
        assert report.heads[0].arrivals[-1].number == merged
        taken.append((steps.statements, steps.taken))
    (few_statements, few), (many_statements, many) = taken
    assert many_statements == few_statements and many < 1.2 * few


def test_cosines_are_those_of_the_experts(made: tuple[Home, Path]) -> None:
    home, base = made
    vectors = [difference(home.archive(n) / task / "model.safetensors", base) for n, task in enumerate(TASKS, start=1)]
    with lineage(home) as reader:
        found = overlap(home, reader, 32)
        newest = overlap(home, reader, 2)
        heard: list[float] = []
        some = overlap(home, reader, 32, most_bytes=base.stat().st_size // 4, report=heard.append)
    assert found.experts == [f"the {task} one" for task in TASKS] and found.share == 1 and not found.left_out
    for i, row in enumerate(found.cosines):
        assert row == pytest.approx([cosine(vectors[i], other) for other in vectors], abs=1e-6)
    assert newest.experts == found.experts[1:]
    assert newest.cosines[0][1] == pytest.approx(found.cosines[1][2], abs=1e-9)
    assert 0.1 < some.share < 0.6 and heard == sorted(heard) and heard[-1] > 0.9
    assert 0 < float(some.cosines[0][0] or 0) == pytest.approx(1.0)


def test_what_is_not_in_the_archive_is_left_out_and_what_is_damaged_is_said(
    made: tuple[Home, Path], tmp_path: Path
) -> None:
    home = Home(shutil.copytree(made[0].root, tmp_path / "home", symlinks=True))
    shutil.rmtree(home.archive(2))
    with lineage(home) as reader:
        found = overlap(home, reader, 32)
        assert (found.experts, found.left_out) == (["the reading one", "the law one"], ["mathematics"])
        (home.base / "model.safetensors").unlink()
        assert overlap(home, reader, 32).failed


def run(home: Home, *words: str | Path) -> Any:
    return forked("report", *words, "--home", home.root)


def test_it_writes_a_page_and_prints_json(made: tuple[Home, Path], tmp_path: Path) -> None:
    home, _ = made
    out = tmp_path / "report.html"
    done = run(home, out)
    assert done.returncode == 0, done.stderr
    assert f"wrote {out}" in done.stdout
    page = out.read_text()
    for words in ("the law one", "Every task in every version", "zero (held out)", "Lambda", "Cosines between"):
        assert words in page
    assert "Traceback" not in done.stderr and not done.stderr
    done = run(home, "--json", "--overlap", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["heads"][0]["found"]["retention"] == 0.6 and found["overlap"] is None
    assert found["heads"][0]["arrivals"][1]["scores"]["reading"]["score"] == 0.9


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), "name the file to write"),
        ((".",), "is a folder"),
        (("gone/report.html",), "there is no folder gone: `mkdir -p gone` first"),
    ],
)
def test_a_file_must_be_named(made: tuple[Home, Path], words: Sequence[str], wanted: str) -> None:
    done = run(made[0], *words)
    assert done.returncode == 2 and wanted in done.stderr
