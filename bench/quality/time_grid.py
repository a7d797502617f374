"""What the next expert starts from, and what is served: every pair of the two, with real training in between.

One after the other, the digit readers' experts are trained from the newest version of an init head; each of those
sequences is then folded by every deploy head, relative to the base and to what an expert was trained from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from safetensors.torch import load_file

from bench.quality import vision
from bench.quality.experts import save
from bench.quality.family import Family
from bench.quality.folding import Stream
from bench.quality.streams import Variant

ROUNDS = tuple(f"{place}-{style}" for place, style in zip(vision.PLACES, 2 * vision.STYLES, strict=True))
"""Eight tasks: every place once, every style twice."""
SHOWN = tuple(f"{place}-{style}" for place in vision.PLACES for style in ("plain", "inverted"))
HELD_OUT = (*vision.BASE_TASKS, *(task for task in SHOWN if task not in ROUNDS))
INITS = (
    Variant("zero_shot", {}),
    Variant("latest", {}),
    Variant("ema", {}),
    Variant("mean", {}),
    Variant("recency", {"scheme": "sqrt"}),
    Variant("task_arithmetic", {}),
)
AVERAGES = (
    Variant("latest", {}),
    Variant("ema", {}),
    Variant("ema", {"start": "first"}),
    Variant("mean", {}),
    Variant("recency", {"scheme": "linear"}),
    Variant("recency", {"scheme": "sqrt"}),
    Variant("recency", {"scheme": "exp"}),
)
SUMS = tuple(Variant(name, {}) for name in ("opcm", "task_arithmetic", "ties", "tsv_m", "iso_c"))


@dataclass(frozen=True)
class Pair:
    """One init and deploy. accumulation, retention: by round, the mean over the eight tasks and over those held out."""

    init: str
    deploy: str
    replay: bool
    relative_to: str
    accumulation: Sequence[float]
    retention: Sequence[float]


def pairs(family: Family, *, replay: bool, inits: Sequence[Variant] = INITS, rounds: Sequence[str] = ROUNDS) -> list[Pair]:
    """All of them; what is in the cache is not made again."""
    found = []
    for init in inits:
        trained = _sequence(family, init, replay, rounds)
        for deploy in (*AVERAGES, *SUMS):
            found.append(_served(family, init, deploy, replay, trained, "base"))
            if deploy in SUMS and init.name != "zero_shot":
                found.append(_served(family, init, deploy, replay, trained, "trained_from"))
    return found


def _sequence(family: Family, init: Variant, replay: bool, rounds: Sequence[str]) -> list[tuple[Path, Path]]:
    """(what it started from, the expert) of each round."""
    folder = family.cache / "vision" / "time" / f"{init.label.replace(' ', '-')}{'-replay' if replay else ''}"
    made = []
    with Stream(init.made(), family.base) as stream:
        for number, task in enumerate(rounds):
            start, expert = folder / f"{number}-start.safetensors", folder / f"{number}.safetensors"
            if not expert.exists():
                save(stream.weights() if number else load_file(family.base), start)
                before = rounds[:number] if replay else ()
                save(vision.finetuned(load_file(start), task, replay=before, seed=number), expert)
            stream.take(expert)
            made.append((start, expert))
    return made


def _served(
    family: Family, init: Variant, deploy: Variant, replay: bool, trained: Sequence[tuple[Path, Path]], relative_to: str
) -> Pair:
    name = f"{init.label}--{deploy.label}--{'replay' if replay else 'plain'}--{relative_to}--{len(trained)}.json"
    path = family.cache / "time" / name.replace(" ", "-")
    if not path.exists():
        accumulation, retention = [], []
        with Stream(deploy.made(), family.base) as stream:
            for start, expert in trained:
                stream.take(expert, origin=start if relative_to == "trained_from" else None)
                scores: Mapping[str, float] = family.score(stream.weights(), (*ROUNDS, *HELD_OUT))
                accumulation.append(fmean(scores[task] for task in ROUNDS))
                retention.append(fmean(scores[task] for task in HELD_OUT))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(Pair(init.label, deploy.label, replay, relative_to, accumulation, retention))))
    return Pair(**json.loads(path.read_text()))
