"""Which method is recommended, and in which words."""

from datetime import UTC, datetime
from pathlib import Path

from daemon.config import Evaluate
from daemon.evaluation.figures import Step, figures
from daemon.reports.report.gathering import Arrival, HeadReport, Report
from daemon.study.costing import Cost
from daemon.study.planning import Plan, variants
from daemon.study.results import Results, results
from daemon.study.telling import conclusion, merit
from registry.records import BaseModel, Score, Scores

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
BASE = BaseModel("base", "0" * 64, 10, 40, NOON)
COST = Cost(1.5, None)


def of(accuracies: dict[str, list[float]], names: list[str], settings: list[str], **score: bool) -> Results:
    """A study in which each head ended with these scores, order by order; the base has 0.5."""
    tried = variants(names, settings)
    orders = []
    zero: Scores = {"a": Score(0.5, **score)}
    for place in range(len(next(iter(accuracies.values())))):
        heads = []
        for one in tried:
            scores = {"a": Score(accuracies[one.head][place], **score)}
            arrivals = [Arrival(0, scores=zero), Arrival(1, expert="e", task="a", scores=scores)]
            found = figures([Step(0, zero), Step(1, scores, "a")], {"a": Score(1.0)}, zero)
            heads.append(HeadReport(one.head, one.method.name, {}, 1, 1, arrivals, zero, found))
        orders.append(Report(BASE, heads, {}, NOON))
    plan = Plan(Path("my base"), {"e": Path("e")}, Evaluate(), tried, [], [["e"]] * len(orders), 0)
    kept = {one.head: {"state_bytes": 100 - place, "published_bytes": 10} for place, one in enumerate(tried)}
    return results(plan, orders, {"e": zero}, {one.head: COST for one in tried}, kept)


def test_the_best_mean_is_recommended() -> None:
    found = of({"ema_1": [0.6, 0.62], "ema_2": [0.7, 0.72]}, ["ema"], ["ema.weight=0.3,0.5"])
    assert found.choice and found.figure == "ACC"
    assert found.choice.command == "mainstem init HOME --base 'my base' --method ema --set weight=0.5"
    assert "do not meet" in found.choice.why and "The base has 0.5." in found.choice.why
    assert [round(row.sensitivity or 0, 3) for row in found.rows] == [0.1, 0.1]
    assert merit(found)[1][1] == "0.71 ± 0.014"


def test_a_higher_mean_that_the_order_may_spoil_is_not() -> None:
    found = of({"mean": [0.70, 0.71], "ema": [0.9, 0.6]}, ["mean", "ema"], [])
    assert found.choice and found.choice.head == "mean"
    assert "hardly tell them apart" in found.choice.why


def test_of_equals_the_one_that_keeps_less() -> None:
    found = of({"mean": [0.7, 0.7], "ema": [0.7, 0.7]}, ["mean", "ema"], [])
    assert found.choice and found.choice.head == "ema"


def test_one_order_has_no_deviation() -> None:
    found = of({"mean": [0.7], "ema": [0.71]}, ["mean", "ema"], [])
    assert found.choice and found.choice.head == "ema" and merit(found)[1][1] == "0.71"
    assert "over one order." in found.choice.why


def test_where_lower_is_better_the_lowest_is_recommended() -> None:
    found = of({"mean": [0.4, 0.41], "ema": [0.3, 0.31]}, ["mean", "ema"], [], higher_is_better=False)
    assert found.choice and found.choice.head == "ema"
    assert "no method is better" not in found.choice.why and "lower is better" in found.choice.why


def test_it_is_said_where_no_merging_is_as_good() -> None:
    found = of({"mean": [0.4, 0.41], "ema": [0.3, 0.31]}, ["mean", "ema"], [])
    assert found.choice and "no method is better than no merging" in found.choice.why


def test_without_a_figure_nothing_is_recommended() -> None:
    found = of({"mean": [0.7], "ema": [0.7]}, ["mean", "ema"], [])
    unknown = [HeadReport(one.head, one.method, {}, 1, 1, [Arrival(0)]) for one in found.rows]
    empty = results(found.plan, [Report(BASE, unknown, {}, NOON)], {}, {one.head: COST for one in found.rows},
        {one.head: {"state_bytes": 1, "published_bytes": 1} for one in found.rows})  # fmt: skip
    assert empty.choice is None and conclusion(empty)[0].startswith("Nothing is recommended")
    assert empty.described()["recommended"] is None
