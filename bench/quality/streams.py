"""Every method over streams of experts. One stream is one cell: its file in the cache is written once it is through.

A cell holds, by arrival, what the merged model scores: of the tasks learned so far where the whole course is wanted,
else of the newest one; after the last arrival always of all tasks, those held out too. ACC, BWT and forgetting are
worked out from that, as docs/evaluation.md defines them, by the product's own functions.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.quality.cache import make_once, note
from bench.quality.family import Family
from bench.quality.folding import Stream
from daemon.evaluation.figures import Step, average_accuracy, backward_transfer, forgetting
from projector.method import Method
from projector.methods import make, methods
from registry.records import Score


@dataclass(frozen=True)
class Variant:
    """A method with those parameters that are not its defaults."""

    name: str
    params: Mapping[str, Any]

    @property
    def label(self) -> str:
        """For people: "ema weight=0.3"."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.params.items())])

    def made(self) -> Method:
        """The method."""
        return make(self.name, self.params)


@dataclass(frozen=True)
class Cell:
    """What one stream gave. steps: by arrival, the scores by task. seconds, cpu_seconds: by arrival, with read-out."""

    variant: str
    order: Sequence[str]
    tasks: Mapping[str, str]
    steps: Sequence[Mapping[str, float]]
    seconds: Sequence[float]
    cpu_seconds: Sequence[float]
    state_bytes: int

    def figures(self, own: Mapping[str, float], held_out: Sequence[str]) -> dict[str, float]:
        """own: by expert. acc: mean over the learned tasks; share: of the experts' own; held_out: mean over those."""
        steps = [
            Step(number, {task: Score(value) for task, value in scores.items()}, self.tasks[name])
            for number, (name, scores) in enumerate(zip(self.order, self.steps, strict=True), start=1)
        ]
        learned = {self.tasks[name] for name in self.order}
        last = replace(steps[-1], scores={task: s for task, s in steps[-1].scores.items() if task in learned})
        steps = [*steps[:-1], last]
        best = self.best(own, len(self.order))
        moved = backward_transfer(steps)
        lost = forgetting(steps)
        final = self.steps[-1]
        figures = {
            "acc": average_accuracy(steps) or 0.0,
            "share": fmean(final[task] / value for task, value in best.items()),
            "bwt": fmean(moved.values()) if moved else 0.0,
            "forgetting": fmean(lost.values()) if lost else 0.0,
            "seconds": fmean(self.cpu_seconds[1:] or self.cpu_seconds),
        }
        away = [task for task in held_out if task in final]
        return figures | ({"held_out": fmean(final[task] for task in away)} if away else {})

    def first(self, count: int) -> "Cell":
        """The stream as it was after so many arrivals."""
        return replace(
            self,
            order=self.order[:count],
            steps=self.steps[:count],
            seconds=self.seconds[:count],
            cpu_seconds=self.cpu_seconds[:count],
        )

    def best(self, own: Mapping[str, float], count: int) -> dict[str, float]:
        """By task that was learned after so many arrivals, what its best expert has by itself."""
        found: dict[str, float] = {}
        for name in self.order[:count]:
            found[self.tasks[name]] = max(own[name], found.get(self.tasks[name], 0.0))
        return found


FIRST = ("mean", "opcm", "tsv_m", "iso_c", "wudi", "task_arithmetic", "ties", "ema", "latest", "zero_shot")


def data_free() -> list[Variant]:
    """Every installed method that asks nothing of an expert but its weights, with its defaults; those that people ask
    for most come first.
    """
    names = [*(name for name in FIRST if name in methods()), *(name for name in methods() if name not in FIRST)]
    return [Variant(name, {}) for name in names if not make(name).needs]


def cell(
    family: Family,
    variant: Variant,
    order: Sequence[str],
    *,
    whole: bool = False,
    at: Sequence[int] = (),
    ready: bool = False,
) -> Cell | None:
    """One stream; from the cache where it is there. Scored in all learned tasks after every arrival if it is to be
    `whole`, else after so many of them. None where it is not there: with `ready`, or while another process makes it.
    """
    path = _path(family, variant, order, whole, at)
    if not ready:
        places = range(1, len(order) + 1) if whole else at
        make_once(path, lambda: _make_cell(path, family, variant, order, places), wait=False)
    return Cell(**json.loads(path.read_text())) if path.exists() else None


def _make_cell(path: Path, family: Family, variant: Variant, order: Sequence[str], at: Collection[int]) -> None:
    steps: list[Mapping[str, float]] = []
    with Stream(variant.made(), family.base) as stream:
        for place, name in enumerate(order, start=1):
            stream.take(family.experts[name])
            if place == len(order):
                wanted = [*family.learned(order), *family.held_out]
            else:
                wanted = family.learned(order[:place]) if place in at else [family.task(name)]
            steps.append(dict(family.score(stream.weights(), wanted)))
        costs = stream.costs
    found = Cell(
        variant.label,
        list(order),
        {name: family.task(name) for name in order},
        steps,
        [one.seconds for one in costs],
        [one.cpu_seconds for one in costs],
        costs[-1].state_bytes,
    )
    note(asdict(found), path)


def _path(family: Family, variant: Variant, order: Sequence[str], whole: bool, at: Sequence[int]) -> Path:
    said = [variant.made().params(), list(order), list(family.held_out), whole, *([list(at)] if at else [])]
    return cell_path(family, variant.name, *said)


def cell_path(family: Family, name: str, *said: Any) -> Path:
    """By what the result depends on, but for the code."""
    found = hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]
    return family.cache / "cells" / family.name / f"{name}-{found}.json"
