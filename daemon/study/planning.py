"""What a study tries, on which experts and in which orders: fixed before it begins, and the same when it goes on."""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import factorial
from pathlib import Path
from random import Random
from typing import Any, get_type_hints

from daemon.checkpoints.checkpoint import SIDECARS, open_path
from daemon.checkpoints.hints import hinting
from daemon.config import Admission, Evaluate
from daemon.errors import BadConfig, DaemonError, Reason
from projector.driver.steps import record_specs, state_bytes
from projector.errors import ProjectorError
from projector.errors import Reason as ProjectorReason
from projector.method import Method
from projector.methods import make, methods
from projector.spec import Schema
from projector.text import listed, shown

FOLDER = "{folder}"
LEAST_EXPERTS = 2
MOST_VARIANTS = 200
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Variant:
    """A method with parameters, as one head. given: those that were asked for, as on a command line."""

    head: str
    method: Method
    given: Mapping[str, str]

    @property
    def label(self) -> str:
        """For people: "ema weight=0.3"."""
        return " ".join([self.method.name, *(f"{key}={value}" for key, value in self.given.items())])


@dataclass(frozen=True)
class LeftOut:
    """What is not tried, why, and what to do about it."""

    label: str
    why: str
    hint: str


@dataclass(frozen=True)
class Plan:
    """A study. experts: by the name that they have in their folder, sorted. orders: of these names."""

    base: Path
    experts: Mapping[str, Path]
    evaluate: Evaluate
    variants: Sequence[Variant]
    left_out: Sequence[LeftOut]
    orders: Sequence[Sequence[str]]
    seed: int

    @property
    def versions(self) -> int:
        """How many are made and scored."""
        return len(self.variants) * len(self.experts) * len(self.orders)

    def described(self) -> dict[str, Any]:
        """By what a study is known again."""
        return {
            "base": str(self.base.absolute()),
            "experts": {name: str(path.absolute()) for name, path in self.experts.items()},
            "evaluate": list(self.evaluate.command),
            "methods": {one.head: {"method": one.method.name, "params": one.method.params()} for one in self.variants},
            "seed": self.seed,
            "orders": [list(order) for order in self.orders],
        }


def plan(
    base: Path,
    experts: Path,
    evaluate: Evaluate,
    names: Sequence[str],
    settings: Sequence[str],
    orders: int,
    seed: int,
    admission: Admission,
) -> Plan:
    """names: of methods, none for all. settings: METHOD.KEY=V1,V2 each. Raises BadConfig, and DaemonError where an
    expert cannot be opened.
    """
    asked = variants(names, settings)
    if not base.exists():
        raise BadConfig(f"--base {base} does not exist", "give a .safetensors file or a folder")
    found = experts_in(experts)
    lacking = {need: _without(found, need, admission) for need in SIDECARS}
    tried, left_out = [], []
    for one in asked:
        missing = [need for need in one.method.needs if lacking.get(need, found)]
        if missing:
            left_out.append(_left_out(one, missing[0], list(lacking.get(missing[0], found)), len(found)))
        else:
            tried.append(one)
    if not tried:
        raise BadConfig(
            "; ".join(f"{one.label} is left out: {one.why}" for one in left_out),
            f"{left_out[0].hint}, or add --methods",
        )
    return Plan(base, found, evaluate, tried, left_out, shuffled(list(found), orders, seed), seed)


def command(words: str, settings: Evaluate) -> Evaluate:
    """Those settings with this command, which is split as a shell splits it. Raises BadConfig."""
    try:
        parts = tuple(shlex.split(words))
    except ValueError as error:
        raise BadConfig(f"--evaluate {words}: {error}", "quote it as for a shell") from None
    if not parts or not any(FOLDER in part for part in parts):
        raise BadConfig(
            f"--evaluate {words}: no argument has {FOLDER} in it, which stands for the model that is to be scored",
            f"for example --evaluate 'python score.py {FOLDER}'",
        )
    return settings.model_copy(update={"command": parts, "require": ()})


def experts_in(folder: Path) -> dict[str, Path]:
    """Every folder and every .safetensors file in it by name, sorted. Raises BadConfig where that is too little."""
    if not folder.is_dir():
        raise BadConfig(f"--experts {folder} is no folder", "name the folder that the experts lie in, one entry each")
    found = {
        path.name: path
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".") and (path.is_dir() or path.name.endswith(WEIGHTS))
    }
    if len(found) < LEAST_EXPERTS:
        raise BadConfig(
            f"--experts {folder}: {len(found) or 'no'} expert{'s' * (len(found) != 1)} in it, it takes two",
            f"put each of them there as a folder or a {WEIGHTS} file",
        )
    return found


def variants(names: Sequence[str], settings: Sequence[str]) -> list[Variant]:
    """Each method once, or as often as its grid has points, which is every combination of the values that were given.

    Raises BadConfig, UnknownMethod and BadParameter.
    """
    grids = _grids(settings)
    chosen = list(dict.fromkeys(names)) or list(methods())
    if stray := grids.keys() - set(chosen):
        name = sorted(stray)[0]
        make(name)  # it may be no method at all
        raise BadConfig(f"--set {name}. ...: {name} is not tried", f"add it to --methods {','.join(chosen)},{name}")
    found = []
    for name in chosen:
        grid = grids.get(name, {})
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        made = {make(name, point): point for point in points}  # 0.5 and 0.50 are one
        head = re.sub(r"\W|^(?=\d)", "_", name, flags=re.ASCII)  # a package of somebody's may call it otherwise
        for number, (method, point) in enumerate(made.items(), start=1):
            found.append(Variant(head if len(made) == 1 else f"{head}_{number}", method, point))
    if len(found) > MOST_VARIANTS:
        raise BadConfig(
            f"these are {len(found)} methods and parameters, {MOST_VARIANTS} are the most", "give --set fewer values"
        )
    return found


def _grids(settings: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """By method and parameter, its values. Raises BadConfig."""
    grids: dict[str, dict[str, list[str]]] = {}
    for word in settings:
        key, given, value = word.partition("=")
        method, _, parameter = key.partition(".")
        if not given or not parameter or not value:
            raise BadConfig(f"--set {word}: expected METHOD.KEY=V1,V2", "for example --set ema.weight=0.3,0.5")
        if parameter in grids.setdefault(method, {}):
            raise BadConfig(f"--set {word}: {key} is given twice", "give all its values at once, with commas")
        words = get_type_hints(type(make(method))).get(parameter) == tuple[str, ...]  # a list is one value
        grids[method][parameter] = [value] if words else [part.strip() for part in value.split(",")]
    return grids


def shuffled(names: Sequence[str], count: int, seed: int) -> list[Sequence[str]]:
    """That many orders, the given one first, no two alike; fewer where there are no more."""
    draw = Random(seed)
    found = {tuple(names): None}
    while len(found) < min(count, factorial(min(len(names), 12))):
        order = list(names)
        draw.shuffle(order)
        found[tuple(order)] = None
    return list(found)


def disk_bytes(plan: Plan, schema: Schema, base_bytes: int) -> int:
    """What is on disk at most: one home at a time, of each head the base, the newest version and the next one."""
    total = 6 * base_bytes  # the home of the experts by themselves, and of what the report reads
    for one in plan.variants:
        state = state_bytes(one.method, schema)
        record = sum(spec.nbytes for spec in record_specs(one.method, schema))
        total += 3 * base_bytes + 2 * state + len(plan.experts) * record
    return total


def linked(plan: Plan, out: Path) -> bool:
    """True where every expert lies on the file system of `out`, so that a link to it will do."""
    device = out.stat().st_dev
    return all(file.stat().st_dev == device for path in plan.experts.values() for file in files_of(path))


def files_of(path: Path) -> Iterator[Path]:
    """The files of an expert: its only one, or all in its folder."""
    if not path.is_dir():
        yield path
        return
    for inner in sorted(path.iterdir()):
        yield from files_of(inner)


def _without(experts: Mapping[str, Path], need: str, admission: Admission) -> list[str]:
    """The experts that have no such sidecar. Raises DaemonError where one cannot be opened at all."""
    lacking = []
    for name, path in experts.items():
        try:
            with hinting(path), open_path(path, needs=[need], naming=admission.naming):
                pass
        except (DaemonError, ProjectorError) as error:
            if error.reason is not Reason.MISSING_SIDECAR:
                raise Unfit(name, str(error), error.hint) from error
            lacking.append(name)
    return lacking


class Unfit(DaemonError):
    """An expert that cannot be studied as it is; `why`."""

    def __init__(self, name: str, why: str, hint: str, reason: Reason | ProjectorReason = Reason.UNKNOWN) -> None:
        more = "then give the same command; or take it out of the folder of --experts, with another --out"
        super().__init__(reason, f"the expert {shown(name)}: {why}", f"{hint}; {more}" if hint else more)


def _left_out(one: Variant, need: str, lacking: Sequence[str], experts: int) -> LeftOut:
    who = (
        "no expert has" if len(lacking) == experts else f"{listed(lacking)} {'has' if len(lacking) == 1 else 'have'} no"
    )
    who = f"{who} {need}{WEIGHTS}"
    return LeftOut(one.label, who, f"lay {need}{WEIGHTS} beside each expert's weights; docs/sidecars.md says how")
