"""docs/comparison.md is what the checked-in results say, and the distances behind it are what they are called."""

import pytest
import torch

from bench.methods_fusionbench import CASES as FUSIONBENCH
from bench.methods_mergekit import CASES as MERGEKIT
from bench.methods_mergekit import RANDOM
from bench.side_by_side import DOCUMENT, Case, apart, document, misrounded, ours, structure
from projector.methods import make


def test_the_document_is_the_generators() -> None:
    text = DOCUMENT.read_text()
    assert text == document(text), "run `make docs`"


@pytest.mark.parametrize("case", [case for case, _ in (*FUSIONBENCH, *MERGEKIT, RANDOM)], ids=lambda case: case.title)
def test_every_case_is_a_method_that_can_be_made(case: Case) -> None:
    assert case.title.startswith(make(case.method, case.params).name)


def test_a_distance_is_that_of_task_vectors() -> None:
    base = {"a": torch.full((4,), 100.0), "b": torch.zeros(2)}
    reference = {"a": torch.full((4,), 103.0), "b": torch.tensor([0.0, 8.0])}
    theirs = {"a": torch.full((4,), 103.0), "b": torch.tensor([0.0, 7.0])}
    found = apart(base, theirs, reference)
    assert found["relative"] == pytest.approx(1 / 10)  # norms 6 and 8
    assert (found["worst"], found["worst_name"]) == (pytest.approx(1 / 8), "b")
    assert found["differ"] == pytest.approx(1 / 6)
    assert apart(base, reference, reference) == {"relative": 0, "worst": 0, "worst_name": "", "differ": 0}


def test_a_misrounded_value_is_one_that_is_not_the_nearest() -> None:
    nearest = {"a": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert misrounded(nearest, nearest) == 0
    assert misrounded({"a": torch.tensor([1.0, 2.0, 3.0, 4.1])}, nearest) == 0.25


def test_what_was_dropped_and_how_the_rest_was_scaled_is_found_out() -> None:
    torch.manual_seed(0)
    base = {"a": torch.randn(100, 100), "b": torch.randn(50, 100)}
    expert = {name: start + 0.1 * torch.randn_like(start) for name, start in base.items()}
    mask = {name: torch.rand_like(start) < 0.5 for name, start in base.items()}
    merged = {
        name: base[name] + 0.3 * factor * mask[name] * (expert[name] - base[name])
        for name, factor in (("a", 2.0), ("b", 3.0))
    }
    found = structure(base, expert, merged, 0.3)
    assert found["kept"] == pytest.approx(0.5, abs=0.02)
    assert (found["factor_low"], found["factor_high"]) == (pytest.approx(2, rel=1e-4), pytest.approx(3, rel=1e-4))
    assert found["factor"] == pytest.approx(2, rel=1e-4)


def test_ours_is_what_the_driver_merges() -> None:
    base = {"layer.weight": torch.zeros(3, 2)}
    experts = [{"layer.weight": torch.full((3, 2), value)} for value in (1.0, 3.0)]
    merged = ours(Case("mean", {}, "theirs"), base, experts)
    assert torch.equal(merged["layer.weight"], torch.full((3, 2), 2.0))
