"""What is measured, in the order in which it is worth most; each block gives its part of the results file.

A block asks for cells, which come from the cache or are made. With `ready` only what is there already is taken, and
what is not is counted as not run.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bench.quality import learning, routing, time_grid
from bench.quality.cache import make_once, note
from bench.quality.family import Family
from bench.quality.streams import Cell, Variant, cell, cell_path, data_free
from daemon.study.planning import shuffled
from projector.methods import make, methods

ORDERS, SEED = 10, 0
GRIDS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "opcm": [{"alpha": 0.3}, {"alpha": 0.7}, {"readout": "isotropic"}, {"readout": "isotropic", "scale": 3.0}],
    "iso_c": [{"scale": 0.5}, {"scale": 1.5}, {"scale": 2.0}, {"scale": 3.0}],
    "tsv_m": [{"scale": 0.5}, {"scale": 1.5}, {"scale": 2.0}],
    "task_arithmetic": [{"scale": 0.1}, {"scale": 0.2}, {"scale": 0.5}, {"scale": "norm"}, {"scale": "per_sqrt"}],
    "ties": [{"density": 0.1}, {"density": 0.4}, {"combine": "sum", "scale": 0.3}],
    "wudi": [{"solver": "adam"}, {"ridge": 0.1}],
    "confluence": [{"scale": 0.85}, {"scale": 1.2}, {"ridge": 0.01}, {"ridge": 1.0}, {"knee": 0.03}, {"knee": 0.3}],
    "ace": [{"normalise": "always"}, {"normalise": "never"}],
    "ema": [{"weight": 0.2}, {"start": "first"}],
}
SIZES = (2, 4, 8, 16, 32)
GROWN = ("mean", "opcm", "iso_c", "tsv_m", "wudi", "ace", "confluence", "ties", "task_arithmetic")

LEARNED = 8  # experts whose coefficients are learned: the first ones of `growth`
PLAIN = (
    *(Variant(name, {}) for name in ("task_arithmetic", "opcm", "tsv_m", "confluence")),
    *(Variant("task_arithmetic", {"scale": scale}) for scale in (0.1, 0.2, 0.5)),
)
"""What learned coefficients stand beside: where they start, other scales for all, and what needs no data."""
ROUTED = (4, 8, 16)
BESIDE = ("opcm", "confluence")


@dataclass
class Maker:
    """Gives cells. ready: only what is in the cache. say: hears of each one. missing: how many it could not give."""

    ready: bool
    say: Callable[[str], None]
    missing: int = 0

    def cell(
        self, family: Family, variant: Variant, order: Sequence[str], *, whole: bool = False, at: Sequence[int] = ()
    ) -> Cell | None:
        """One stream, None where it is not there and is not for this process to make."""
        found = cell(family, variant, order, whole=whole, at=at, ready=self.ready)
        if found is None:
            self.missing += 1
        else:
            self.say(f"{family.name}: {variant.label}: {len(order)} experts")
        return found

    def kept(self, path: Path, label: str, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """Anything else that is one file, in the same way."""
        if not path.exists() and (self.ready or not make_once(path, lambda: note(make(), path), wait=False)):
            self.missing += 1
            return None
        self.say(label)
        found: Mapping[str, Any] = json.loads(path.read_text())
        return found


def streams(family: Family, maker: Maker, orders: int = ORDERS, *, whole: bool = True) -> dict[str, Any]:
    """Every method: the first order for all of them, then the other ones for those that depend on it.

    whole: the first order is scored in all learned tasks at every arrival.
    """
    variants = data_free()
    drawn = shuffled(list(family.experts), orders, SEED)
    own, base = family.own_scores(), family.base_scores()
    found: dict[str, list[Cell]] = {one.label: [] for one in variants}
    for place, order in enumerate(drawn):
        for one in variants:
            if place and one.made().order_independent:
                continue
            made = maker.cell(family, one, order, whole=whole and place == 0)
            if made:
                found[one.label].append(made)
    learned = family.learned(family.experts)
    return {
        "experts": {
            name: {"task": family.task(name), "base": base[family.task(name)], "own": own[name]} for name in own
        },
        "held_out": {task: base[task] for task in family.held_out},
        "base": {"acc": fmean(base[task] for task in learned), "held_out": _mean(base, family.held_out)},
        "own": {"acc": fmean(own.values())},
        "methods": {label: _row(cells, own, family) for label, cells in found.items() if cells},
        "not_run": [label for label, cells in found.items() if not cells],
    }


def sensitivity(family: Family, maker: Maker) -> dict[str, Any]:
    """The first order, other values of the parameters that matter most."""
    order, own = list(family.experts), family.own_scores()
    rows = {}
    for name, points in GRIDS.items():
        for point in points if name in methods() else ():
            one = Variant(name, point)
            made = maker.cell(family, one, order)
            if made:
                rows[one.label] = made.figures(own, family.held_out)
    return rows


def growth(family: Family, maker: Maker, sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """The experts of one drawn order, after so many of them: of a fold that is the same as merging so many alone."""
    own, order = family.own_scores(), _growing(family)
    at = [size for size in sizes if size <= len(order)]
    rows: dict[str, Any] = {}
    for name in GROWN if at else ():
        made = maker.cell(replace(family, held_out=[]), Variant(name, {}), order[: at[-1]], at=at)
        if made:
            rows[name] = {}
            for size in at:
                figures = made.first(size).figures(own, ())
                rows[name][str(size)] = {key: figures[key] for key in ("acc", "share", "bwt")}
    return rows


def learned(family: Family, maker: Maker, courses: Sequence[learning.Course]) -> dict[str, Any]:
    """The first experts of `growth`: their coefficients learned without labels, beside what needs no data."""
    order, own = _growing(family)[:LEARNED], family.own_scores()
    some = replace(family, held_out=[])
    found: dict[str, Any] = {}
    for course in courses:
        made = maker.kept(
            cell_path(family, "adamerging", asdict(course), order),
            f"{family.name}: adamerging {course.label}: {len(order)} experts",
            partial(learning.learned, family, order, course),
        )
        if made:
            found[course.label] = {**made, "of": course.of}
    plain = {one.label: maker.cell(some, one, order) for one in PLAIN if one.name in methods()}
    if not found:
        return {}
    base = family.base_scores()
    return {
        "tasks": family.learned(order),
        "own": fmean(own[name] for name in order),
        "base": fmean(base[task] for task in family.learned(order)),
        "learned": found,
        "plain": {label: made.steps[-1] for label, made in plain.items() if made},
    }


def routed(family: Family, maker: Maker) -> dict[str, Any]:
    """By number of experts, those of `growth`, the share of the experts' own accuracy: smile as it is published, with
    its router, and with one that has kept half of the experts, beside methods that merge.
    """
    own, order = family.own_scores(), _growing(family)
    rows: dict[str, Any] = {}
    for size in ROUTED:
        if size > len(order):
            continue
        some = order[:size]
        row = {}
        for key, cap in (("cap", size), ("half", size // 2)):
            made = maker.kept(
                cell_path(family, "smile-routed", cap, some),
                f"{family.name}: smile, routed: {cap} of {size} experts",
                partial(routing.scored, family, some, cap),
            )
            if made:
                row[key] = {form: _share(scores, own, some, family) for form, scores in made.items()}
        merged = {
            name: maker.cell(replace(family, held_out=[]), Variant(name, {}), some)
            for name in BESIDE
            if name in methods()
        }
        if row:
            plain = {name: made.figures(own, ())["share"] for name, made in merged.items() if made}
            rows[str(size)] = {**row, "merged": plain}
    return rows


def grid(family: Family, maker: Maker, *, replay: bool) -> list[dict[str, Any]]:
    """The time grid."""
    found = time_grid.pairs(family, replay=replay, ready=maker.ready)
    maker.missing += time_grid.PAIRS - len(found)
    return [
        {**vars(pair), "accumulation": list(pair.accumulation), "retention": list(pair.retention)} for pair in found
    ]


def _row(cells: Sequence[Cell], own: Mapping[str, float], family: Family) -> dict[str, Any]:
    figures = [one.figures(own, family.held_out) for one in cells]
    spread = {
        key: {
            "mean": fmean(values),
            "stdev": stdev(values) if len(values) > 1 else None,
            "least": min(values),
            "most": max(values),
        }
        for key in figures[0]
        if (values := [one[key] for one in figures])
    }
    method = make(cells[0].variant.split()[0])
    first = cells[0]
    by_arrival = [(scores, first.best(own, place)) for place, scores in enumerate(first.steps, start=1)]
    curve = [
        fmean(scores[task] / value for task, value in best.items())
        for scores, best in by_arrival
        if best.keys() <= scores.keys()
    ]
    return {
        **spread,
        "orders": len(cells),
        "order_independent": method.order_independent,
        "state_bytes": first.state_bytes,
        "by_task": {task: fmean(one.steps[-1][task] for one in cells) for task in dict.fromkeys(first.tasks.values())},
        "curve": curve,
        "first_acc": figures[0]["acc"],
    }


def _growing(family: Family) -> list[str]:
    """The order in which more and more experts come."""
    return list(shuffled(list(family.experts), 2, SEED)[1])


def _share(scores: Mapping[str, float], own: Mapping[str, float], order: Sequence[str], family: Family) -> float:
    """Of what each expert has by itself in its task, the mean part that is there."""
    return fmean(scores[family.task(name)] / own[name] for name in order)


def _mean(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    return fmean(scores[task] for task in tasks) if tasks else None
