"""What came of a study, read from the registries of its homes, and which method is recommended, by a rule."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from daemon.evaluation.figures import Spread, accumulation, mean, order_spread, retention
from daemon.release import software_version
from daemon.reports.report.gathering import HeadReport, Report
from daemon.study.costing import Cost
from daemon.study.planning import LeftOut, Plan, Variant
from projector.text import plain
from registry.records import Scores, plain_scores

ACC, HELD_IN, HELD_OUT = "ACC", "held in", "held out"
RULE = (
    "the best mean over the orders, made worse by one standard deviation, so that a better mean does not count where "
    "orders take it below a worse one; of equals, the one that keeps fewer bytes"
)


@dataclass(frozen=True)
class Row:
    """A method with parameters, over the orders. None: nothing there to work it out from.

    held_in, held_out: the means of the tasks that are not held out, and that are. share: of the experts' own scores.
    sensitivity: between the best and the worst of the method's own grid. runs: by order, its versions.
    """

    head: str
    label: str
    method: str
    params: Mapping[str, Any]
    acc: Spread | None
    held_in: Spread | None
    held_out: Spread | None
    share: Spread | None
    bwt: Spread | None
    sensitivity: float | None
    seconds: float
    peak_bytes: int | None
    state_bytes: int
    published_bytes: int
    needs: Sequence[str]
    order_independent: bool
    approximate: bool
    runs: Sequence[HeadReport] = ()

    @property
    def kept_bytes(self) -> int:
        """State and what is published."""
        return self.state_bytes + self.published_bytes

    def figure(self, name: str) -> Spread | None:
        """One of those that methods may be compared by."""
        return {ACC: self.acc, HELD_IN: self.held_in, HELD_OUT: self.held_out}[name]


@dataclass(frozen=True)
class Choice:
    """What is recommended: the head, the command line that makes a home with it, by which figure, and why."""

    head: str
    label: str
    command: str
    figure: str
    why: str
    rule: str = RULE


@dataclass(frozen=True)
class Results:
    """Everything. report: of the first order. figure: what the methods are compared by; None where nothing is."""

    plan: Plan
    report: Report
    rows: Sequence[Row]
    base: Scores
    own: Mapping[str, Scores] = field(default_factory=dict)
    figure: str | None = None
    choice: Choice | None = None

    @property
    def higher_is_better(self) -> bool:
        """Whether that is so of the scores in a mean."""
        return all(run.found.higher_is_better for row in self.rows for run in row.runs if run.found)

    @property
    def base_figure(self) -> float | None:
        """The figure of the base, over the same tasks."""
        if self.figure == ACC:
            learned = next((run.found.learned for row in self.rows for run in row.runs if run.found), ())
            counted = next((run.found.left_out for row in self.rows for run in row.runs if run.found), ())
            return mean(self.base, [task for task in learned if task not in counted])
        return (retention if self.figure == HELD_OUT else accumulation)(self.base)

    @property
    def left_out(self) -> Sequence[LeftOut]:
        """What was not tried."""
        return self.plan.left_out

    def described(self) -> dict[str, Any]:
        """study.json."""
        return {
            "format": 1,
            "mainstem": software_version(),
            "made_at": self.report.made_at.isoformat(),
            "base": {
                "name": self.report.base.name,
                "sha256": self.report.base.sha256,
                "scores": plain_scores(self.base),
            },
            **{key: value for key, value in self.plan.described().items() if key not in ("base", "experts", "methods")},
            "experts": {name: plain_scores(scores) for name, scores in self.own.items()},
            "figure": self.figure,
            "methods": [_described(row) for row in self.rows],
            "left_out": [asdict(one) for one in self.left_out],
            "recommended": asdict(self.choice) if self.choice else None,
        }


def results(
    plan: Plan,
    orders: Sequence[Report],
    own: Mapping[str, Scores],
    costs: Mapping[str, Cost],
    kept: Mapping[str, Mapping[str, int]],
) -> Results:
    """orders: a report of each. own: by expert, what it scores by itself. kept: by head, the bytes."""
    runs = {one.head: [_of(report, one.head) for report in orders] for one in plan.variants}
    base = orders[0].heads[0].base
    rows = [_row(one, runs[one.head], costs[one.head], kept[one.head]) for one in plan.variants]
    by = next((name for name in (ACC, HELD_IN, HELD_OUT) if all(row.figure(name) for row in rows)), None)
    rows = [_with_sensitivity(row, rows, by) for row in rows]
    found = Results(plan, orders[0], rows, base, own, by)
    return replace(found, choice=_choice(found, by)) if by else found


def _of(report: Report, head: str) -> HeadReport:
    return next(one for one in report.heads if one.name == head)


def _row(one: Variant, runs: Sequence[HeadReport], cost: Cost, kept: Mapping[str, int]) -> Row:
    def over(figure: str) -> Spread | None:
        values = [getattr(run.found, figure) if run.found else None for run in runs]
        known = [value for value in values if value is not None]
        return order_spread(known) if known and len(known) == len(values) else None

    return Row(
        head=one.head,
        label=one.label,
        method=one.method.name,
        params=one.method.params(),
        acc=over("acc"),
        held_in=over("accumulation"),
        held_out=over("retention"),
        share=over("mean_normalised"),
        bwt=over("bwt"),
        sensitivity=None,
        seconds=cost.seconds,
        peak_bytes=cost.peak_bytes,
        state_bytes=kept["state_bytes"],
        published_bytes=kept["published_bytes"],
        needs=list(one.method.needs),
        order_independent=one.method.order_independent,
        approximate=one.method.approximate,
        runs=runs,
    )


def _with_sensitivity(row: Row, rows: Sequence[Row], by: str | None) -> Row:
    grid = [found.mean for one in rows if one.method == row.method and by and (found := one.figure(by))]
    return replace(row, sensitivity=max(grid) - min(grid) if len(grid) > 1 else None)


def _choice(found: Results, by: str) -> Choice:
    ranked = sorted(found.rows, key=lambda row: (-_safe(row, by, found.higher_is_better), row.kept_bytes))
    best = ranked[0]
    variant = next(one for one in found.plan.variants if one.head == best.head)
    words = ["mainstem", "init", "HOME", "--base", str(found.plan.base), "--method", best.method]
    words += [word for key, value in variant.given.items() for word in ("--set", f"{key}={value}")]
    return Choice(best.head, best.label, shlex.join(words), by, _why(found, ranked, by))


def _safe(row: Row, by: str, higher_is_better: bool) -> float:
    """The mean less one deviation, in the direction in which more is better."""
    spread = row.figure(by)
    assert spread
    return (spread.mean if higher_is_better else -spread.mean) - (spread.stdev or 0.0)


def _why(found: Results, ranked: Sequence[Row], by: str) -> str:
    best, *others = ranked
    spread, base = best.figure(by), found.base_figure
    assert spread
    orders = f"{spread.orders} orders" if spread.orders > 1 else "one order"
    direction = "" if found.higher_is_better else ", and lower is better"
    words = [f"{best.label}: {by} {told(spread)} over {orders}{direction}."]
    if others and (next_best := others[0].figure(by)):
        apart = spread.least > next_best.most or next_best.least > spread.most
        words.append(
            f"Next is {others[0].label}: {told(next_best)}; "
            + (
                "their ranges over the orders do not meet."
                if apart
                else "their ranges over the orders meet: these experts hardly tell them apart."
            )
        )
    if base is not None:
        worse = spread.mean <= base if found.higher_is_better else spread.mean >= base
        words.append(f"The base has {plain(base, 4)}" + (": no method is better than no merging." if worse else "."))
    return " ".join(words)


def told(spread: Spread | None) -> str:
    """A mean and how far it goes: "0.912 ± 0.004"."""
    if spread is None:
        return "-"
    return plain(spread.mean, 4) + ("" if spread.stdev is None else f" ± {plain(spread.stdev, 2)}")


def _described(row: Row) -> dict[str, Any]:
    return {
        **{key: value for key, value in asdict(replace(row, runs=())).items() if key != "runs"},
        "orders": [_run(run) for run in row.runs],
    }


def _run(run: HeadReport) -> dict[str, Any]:
    return {
        "figures": asdict(run.found) if run.found else None,
        "versions": [
            {"number": one.number, "expert": one.expert, "task": one.task, "scores": plain_scores(one.scores)}
            for one in run.arrivals
            if one.number
        ],
    }
