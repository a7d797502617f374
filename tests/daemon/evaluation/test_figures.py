"""The field's figures against examples that were worked out by hand."""

import doctest
from math import sqrt

import pytest

from daemon.evaluation import figures as module
from daemon.evaluation.figures import (
    Step,
    accumulation,
    average_accuracy,
    backward_transfer,
    better,
    figures,
    forgetting,
    geometric_mean,
    mean,
    normalised,
    order_spread,
    retention,
)
from registry.records import Score, Scores


def scores(held_out: float | None = None, lower: float | None = None, **tasks: float) -> Scores:
    """`tasks` are held in; `held_out` is the task "zero", and `lower` the perplexity "ppl"."""
    found = {task: Score(score) for task, score in tasks.items()}
    if held_out is not None:
        found["zero"] = Score(held_out, held_out=True)
    if lower is not None:
        found["ppl"] = Score(lower, higher_is_better=False)
    return found


#   a = a(t, i)      a     b     c     d (no expert yet)
BASE = scores(0.60, 20, a=0.50, b=0.40, c=0.30, d=0.30)
STEPS = [
    Step(0, BASE),
    Step(1, scores(0.58, 22, a=0.90, b=0.40, c=0.30, d=0.30), "a"),
    Step(2, scores(0.55, 21, a=0.80, b=0.80, c=0.35, d=0.25), "b"),
    Step(3, scores(0.54, 25, a=0.70, b=0.85, c=0.75, d=0.20), "c"),
]
OWN = scores(None, 20, a=0.95, b=0.90, c=0.80)


def test_acc_is_the_mean_of_what_was_learned() -> None:
    assert average_accuracy(STEPS) == pytest.approx((0.70 + 0.85 + 0.75) / 3)
    assert average_accuracy(STEPS[:2]) == pytest.approx(0.90)
    assert average_accuracy(STEPS[:1]) is None


def test_bwt_is_what_came_of_a_task_after_its_expert() -> None:
    assert backward_transfer(STEPS) == pytest.approx({"a": 0.70 - 0.90, "b": 0.85 - 0.80})  # the last has no after
    found = figures(STEPS, OWN, BASE)
    assert found is not None and found.bwt == pytest.approx(-0.075) and found.bwt_tasks == 2


def test_a_task_that_came_twice_counts_from_its_last_expert_on() -> None:
    steps = [*STEPS, Step(4, scores(a=0.95, b=0.80, c=0.70), "a"), Step(5, scores(a=0.90, b=0.80, c=0.70))]
    assert backward_transfer(steps) == pytest.approx({"a": -0.05, "b": 0.0, "c": -0.05})


def test_an_arrival_that_was_not_scored_has_no_backward_transfer() -> None:
    unscored = [STEPS[0], Step(1, {}, "a"), *STEPS[2:]]
    assert backward_transfer(unscored) == pytest.approx({"b": 0.05})
    assert average_accuracy(unscored) == average_accuracy(STEPS)


def test_forgetting_is_from_the_best_that_a_merged_model_had() -> None:
    assert forgetting(STEPS) == pytest.approx({"a": 0.2, "b": -0.05, "c": -0.4, "d": 0.1, "zero": 0.04, "ppl": 4.0})
    assert forgetting(STEPS[:2]) == {}, "the base is no merged model"


def test_accumulation_retention_and_their_geometric_mean() -> None:
    last = STEPS[-1].scores
    assert accumulation(last) == pytest.approx((0.70 + 0.85 + 0.75 + 0.20) / 4)
    assert retention(last) == 0.54
    found = figures(STEPS, OWN, BASE)
    assert found is not None and found.balance == pytest.approx(sqrt(0.625 * 0.54))
    assert geometric_mean(0.5, None) is None and geometric_mean(-0.1, 0.5) is None


def test_the_share_of_the_experts_own_score() -> None:
    assert normalised(STEPS[-1].scores, OWN) == pytest.approx(
        {"a": 0.70 / 0.95, "b": 0.85 / 0.90, "c": 0.75 / 0.80, "ppl": 20 / 25}
    )
    assert normalised(scores(a=0.0, b=0.5), scores(a=0.5, b=0.0)) == {}


def test_what_is_won_over_the_base_held_in_and_held_out() -> None:
    found = figures(STEPS, OWN, BASE)
    assert found is not None
    assert found.held_in_gain == pytest.approx((0.20 + 0.45 + 0.45 - 0.10) / 4)
    assert found.held_out_gain == pytest.approx(-0.06)


def test_scores_of_two_directions_have_no_mean() -> None:
    found = figures(STEPS, OWN, BASE)
    assert found is not None and found.higher_is_better and found.left_out == ["ppl"]
    losses = [
        Step(0, {"x": Score(9.0, False), "y": Score(8.0, False)}),
        Step(1, {"x": Score(5.0, False), "y": Score(8.0, False)}, "x"),
        Step(2, {"x": Score(6.0, False), "y": Score(4.0, False)}, "y"),
    ]
    found = figures(losses, {}, losses[0].scores)
    assert found is not None and not found.higher_is_better and found.left_out == []
    assert found.acc == 5.0 and found.bwt == -1.0 and found.held_in_gain == 3.5
    assert better(Score(6.0, False), Score(5.0, False)) == -1.0


def test_a_mean_of_other_tasks_is_another_figure() -> None:
    assert mean(scores(a=0.5), ["a", "b"]) is None and mean({}, []) is None


def test_what_was_not_scored_is_not_guessed() -> None:
    assert figures([], {}, {}) is None
    assert figures([Step(0), Step(1, {}, "a")], OWN, BASE) is None
    later = figures([*STEPS, Step(4, {}, "d")], OWN, BASE)
    assert later == figures(STEPS, OWN, BASE)
    alone = figures([Step(7, scores(0.5))], {}, {})
    assert alone is not None
    assert (alone.acc, alone.bwt, alone.accumulation, alone.retention, alone.balance) == (None, None, None, 0.5, None)
    assert (alone.held_in_gain, alone.held_out_gain, alone.mean_normalised) == (None, None, None)


def test_order_spread_of_three_orders() -> None:
    found = order_spread([0.70, 0.74, 0.72])
    assert (found.orders, found.least, found.most) == (3, 0.70, 0.74)
    assert found.mean == pytest.approx(0.72) and found.stdev == pytest.approx(0.02)
    assert order_spread([0.7]).stdev is None


def test_the_examples_of_its_docstrings() -> None:
    assert doctest.testmod(module).failed == 0
