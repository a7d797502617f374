"""A whole study, one cell after the other. Whatever is finished lies in its folder, and is not done again.

OUT/
  plan.json        what is studied; another plan needs another folder
  mainstem.toml    settings of the person's, if any
  alone/           a home with every expert by itself, and every score that was ever taken
  costs/           what each method takes by itself
  orders/01/       the home of one order; once it is through, 01.json, and little more than its registry
  study.json  report.html
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

from daemon.checkpoints.checkpoint import open_path
from daemon.compute.resources import check_budget
from daemon.config import Settings
from daemon.disk import durable
from daemon.errors import BadConfig, BadHome
from daemon.evaluation.figures import accumulation
from daemon.layout import Home
from daemon.reports.report.gathering import Report, gather
from daemon.study.costing import ARRIVALS, Cost, cost
from daemon.study.course import Course, Shared
from daemon.study.planning import LeftOut, Plan, disk_bytes, linked
from daemon.study.results import Results, results
from projector.methods import make
from projector.text import plain, shown, size
from registry.reader import Reader
from registry.records import Evaluation, Scores

ALONE = "alone"  # the head, and its home


class Console:
    """Hears what a study does, line by line."""

    def say(self, text: str) -> None:
        """One line."""


class Study:
    """One study in its folder."""

    def __init__(self, plan: Plan, out: Path, settings: Settings, to: Console, stopping: Event) -> None:
        """stopping: once it is set, Abandoned is raised; the same study then goes on where it was."""
        self._plan, self._out, self._to, self._compute = plan, out, to, settings.compute
        config = self.config(out)
        self._shared = Shared(plan, settings, config.read_bytes() if config.exists() else None, stopping)
        self._cells = 1 + len(plan.experts) + len(plan.variants) + plan.versions
        self._done = 0
        self._own: dict[str, Evaluation] = {}

    @staticmethod
    def config(out: Path) -> Path:
        """Where a study finds settings."""
        return out / "mainstem.toml"

    def outlined(self) -> str:
        """What is tried, in a line, and what is left out, in a line each."""
        plan = self._plan
        lines = [
            f"methods and parameters: {len(plan.variants)}, experts: {len(plan.experts)}, orders: {len(plan.orders)}; "
            f"versions to be made and scored: {plan.versions}"
        ]
        lines += [f"left out: {one.label}: {one.why}; {one.hint}" for one in plan.left_out]
        return "\n".join(lines)

    def estimate(self) -> str:
        """What the whole study takes, in words: the first cells are made and timed, in a folder that goes again."""
        beside = next(folder for folder in self._out.parents if folder.is_dir())
        self._check_room(beside)
        self._to.say("timing the first cells ...")
        with TemporaryDirectory(dir=beside, prefix=f"{self._out.name}.timed-") as folder:
            with self._alone(Path(folder)) as alone:
                base, costs = self._first_cells(alone, Path(folder))
            return self._takes(base, costs, self._done)

    def run(self) -> Results:
        """Does what is not done yet. Raises DaemonError, and Abandoned."""
        durable.make_folder(self._out)
        with ExitStack() as closing:
            try:
                closing.callback(os.close, durable.lock(self._out / "lock"))
            except BlockingIOError:
                raise BadHome(
                    f"another mainstem study is running in {self._out}", "wait, or choose another --out"
                ) from None
            self._settle_plan()
            self._check_room(self._out)
            alone = closing.enter_context(self._alone(self._out))
            base, costs = self._first_cells(alone, self._out)
            there = self._there(alone)
            going_on = f"going on: {there} of {self._cells} cells are there; " if there > self._done else ""
            self._to.say(going_on + self._takes(base, costs, there))
            own = self._by_themselves(alone, list(self._plan.experts))
            for place, order in enumerate(self._plan.orders, start=1):
                self._order(place, order, own)
            return self._results({name: one.scores for name, one in own.items()}, costs)

    def first(self) -> tuple[Home, Reader]:
        """The home of the first order, of which the archive is still there, and its registry."""
        home = self._home(1)
        return home, Reader.open(home.registry)

    def _home(self, place: int) -> Home:
        return Home(self._out / "orders" / f"{place:02d}")

    def _mark(self, place: int) -> Path:
        """There once an order is through: what each head's newest version took."""
        return self._home(place).root.with_suffix(".json")

    def _settle_plan(self) -> None:
        path, new = self._out / "plan.json", self._plan.described()
        if not path.exists():
            durable.replace_file(path, json.dumps(new, indent=2).encode() + b"\n")
            return
        old = json.loads(path.read_bytes())
        if other := [key for key in new if old.get(key) != json.loads(json.dumps(new[key]))]:
            raise BadConfig(
                f"{self._out} has another study in it: its {other[0]} is not the one that was given",
                f"give what {path} says to go on with it, or another --out",
            )

    def _check_room(self, folder: Path) -> None:
        """Raises BadHome where the disk is too full, BadConfig where memory is too small for all heads at once."""
        plan = self._plan
        with open_path(plan.base) as base:
            needed = disk_bytes(plan, base.tensors.schema, base.size_bytes)
            try:
                check_budget(base.tensors.schema, [one.method for one in plan.variants], self._compute)
            except BadConfig as error:
                raise BadConfig(str(error), f"{error.hint}; or try fewer --methods at a time") from None
        free = shutil.disk_usage(folder).free
        copies = "" if linked(plan, folder) else ", and a copy of one expert at a time: they lie on another file system"
        self._to.say(f"at most {size(needed)} of disk in {self._out}, which has {size(free)} free{copies}")
        there = sum(path.lstat().st_size for path in self._out.rglob("*")) if self._out.exists() else 0
        if needed > free + there:
            raise BadHome(
                f"the study needs {size(needed)} of disk, and {self._out} has {size(free)} free",
                "make room, choose another --out, or try fewer --methods at a time",
            )

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[Course]:
        with Course(Home(folder / ALONE), {ALONE: make("latest")}, self._shared) as alone:
            self._shared.keep_in(alone.store)
            try:
                yield alone
            finally:
                self._shared.book = None

    def _first_cells(self, alone: Course, folder: Path) -> tuple[Evaluation, dict[str, Cost]]:
        """The base, the experts that costs are measured with, and the costs: by these the rest is estimated."""
        base = self._base(alone)
        self._by_themselves(alone, list(self._plan.experts)[:ARRIVALS])
        return base, self._costs(folder)

    def _base(self, alone: Course) -> Evaluation:
        known = alone.store.version(ALONE, 0)
        there = alone.store.evaluation(known.evaluation) if known else None
        found = there or alone.score(0)[ALONE]
        self._tell("the base", found.scores, new=there is None)
        return found

    def _costs(self, folder: Path) -> dict[str, Cost]:
        plan, costs, left_out = self._plan, {}, list(self._plan.left_out)
        for one in plan.variants:
            new = not (folder / "costs" / f"{one.head}.json").exists()
            found = cost(folder / "costs", one, list(plan.experts), self._shared)
            if isinstance(found, LeftOut):
                left_out.append(found)
                self._tell(f"{one.label} is left out: {found.why}", {})
                continue
            costs[one.head] = found
            memory = "" if found.peak_bytes is None else f", {size(found.peak_bytes)} of memory"
            self._tell(f"{one.label} by itself: {plain(found.seconds)} s an arrival{memory}", {}, new=new)
        tried = [one for one in plan.variants if one.head in costs]
        if not tried:
            raise BadConfig(f"{left_out[-1].label} is left out: {left_out[-1].why}", "give other --methods, and --out")
        self._cells -= plan.versions
        self._plan = self._shared.plan = replace(plan, variants=tried, left_out=left_out)
        self._cells += self._plan.versions
        return costs

    def _by_themselves(self, alone: Course, names: Sequence[str]) -> dict[str, Evaluation]:
        """Of the experts with these names, the first ones. Raises Unfit where one is refused."""
        own = {}
        for number, name in enumerate(names, start=1):
            if name in self._own:
                own[name] = self._own[name]
                continue
            new = alone.done < number
            if new:
                alone.take(name)
            expert = self._shared.alone[name] = alone.arrived(number)
            version = alone.store.version(ALONE, number)
            there = alone.store.evaluation(version.evaluation) if version else None
            own[name] = there or alone.score(number)[ALONE]
            self._own[name] = own[name]
            alone.judge(expert, own[name])
            self._tell(f"expert {shown(name)} by itself", own[name].scores, new=there is None)
        return own

    def _order(self, place: int, order: Sequence[str], own: Mapping[str, Evaluation]) -> None:
        mark, home = self._mark(place), self._home(place)
        if mark.exists():
            self._done += len(order) * len(self._plan.variants)
            self._shrink(home, place)
            return
        heads = {one.head: one.method for one in self._plan.variants}
        with Course(home, heads, self._shared, anew=True) as course:
            course.score(0)
            for number, name in enumerate(order, start=1):
                if number < course.done:
                    self._done += len(heads)
                    continue
                if number > course.done:
                    course.take(name)
                new = not course.scored(number)
                course.judge(course.arrived(number), own[name])
                scored = course.score(number)
                where = f"order {place}, arrival {number} of {len(order)} ({shown(name)})"
                for one in self._plan.variants:
                    self._tell(f"{where}: {one.label}", scored[one.head].scores, new=new)
            kept = {one.head: course.kept_bytes(one.head) for one in self._plan.variants}
        durable.replace_file(mark, json.dumps(kept).encode())
        self._shrink(home, place)

    def _shrink(self, home: Home, place: int) -> None:
        """Leaves the registry of an order that is through, and of the first one what the report reads: the base, and
        the experts, which are links."""
        read = [home.base, home.root / "archive"] if place == 1 else []
        for path in (home.published, home.states("any").parent, home.tmp, home.base, home.root / "archive"):
            if path not in read:
                durable.remove(path)

    def _there(self, alone: Course) -> int:
        """How many cells are finished, beside those that were told of."""
        more = 0
        for place in range(1, len(self._plan.orders) + 1):
            if self._mark(place).exists():
                more += len(self._plan.experts) * len(self._plan.variants)
            elif self._home(place).exists():
                with Reader.open(self._home(place).registry) as reader:
                    more += max(0, max(head.newest for head in reader.heads()) - 1) * len(self._plan.variants)
        return self._done + alone.done - len(self._own) + more

    def _takes(self, base: Evaluation, costs: Mapping[str, Cost], done: int) -> str:
        """In words, from the first cells: what is to be done yet."""
        plan = self._plan
        share = (self._cells - done) / (plan.versions + len(plan.experts))
        merging = sum(one.seconds for one in costs.values()) * len(plan.experts) * len(plan.orders) * share
        scoring = base.seconds * (plan.versions + len(plan.experts)) * share / plan.evaluate.concurrency
        return (
            f"{self._cells} cells in all; about {lasting(merging + scoring)} at most: {lasting(merging)} of merging, "
            f"{lasting(scoring)} of scoring ({plain(base.seconds)} s each; equal weights are scored once)"
        )

    def _tell(self, what: str, scores: Scores, *, new: bool = True) -> None:
        self._done += 1
        if new:
            found = accumulation(scores) if scores else None
            self._to.say(f"{self._done}/{self._cells} {what}" + ("" if found is None else f": {plain(found, 4)}"))

    def _results(self, own: Mapping[str, Scores], costs: Mapping[str, Cost]) -> Results:
        reports: list[Report] = []
        now = datetime.now(UTC)
        for place in range(1, len(self._plan.orders) + 1):
            with Reader.open(self._home(place).registry) as reader:
                reports.append(gather(reader, now, window=len(self._plan.experts) + 1))
        kept = json.loads(self._mark(1).read_bytes())
        return results(self._plan, reports, own, costs, kept)


def lasting(seconds: float) -> str:
    """A time as people say it.

    >>> lasting(4.21), lasting(150), lasting(9000)
    ('4.2 s', '2.5 min', '2.5 h')
    """
    for unit, factor in (("d", 172800), ("h", 7200), ("min", 120)):
        if seconds >= factor:
            return f"{plain(2 * seconds / factor, 2) if unit != 'd' else plain(seconds / 86400, 2)} {unit}"
    return f"{plain(seconds, 2)} s"
