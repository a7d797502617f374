"""What the next expert starts from, and what is served: every pair of the two, with real training in between.

One after the other, the digit readers' experts are trained from the newest version of an init head; each of those
sequences is then folded by every deploy head, relative to the base and to what an expert was trained from.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

from safetensors.torch import load_file

from bench.quality import vision
from bench.quality.cache import claimed, note, save
from bench.quality.family import Family
from bench.quality.folding import Stream
from bench.quality.streams import Variant

ROUNDS = tuple(f"{place}-{style}" for place, style in zip(vision.PLACES, 2 * vision.STYLES, strict=True))
"""Eight tasks: every place once, every style twice."""
SHOWN = tuple(f"{place}-{style}" for place in vision.PLACES for style in ("plain", "inverted"))
HELD_OUT = (*vision.BASE_TASKS, *(task for task in SHOWN if task not in ROUNDS))
IMAGES = 100  # of a task and round
INITS = (
    Variant("ema", {}),
    Variant("latest", {}),
    Variant("zero_shot", {}),
    Variant("mean", {}),
    Variant("recency", {"scheme": "sqrt"}),
    Variant("task_arithmetic", {}),
)
AVERAGES = (
    Variant("latest", {}),
    Variant("ema", {}),
    Variant("mean", {}),
    Variant("ema", {"start": "first"}),
    Variant("recency", {"scheme": "sqrt"}),
)
SUMS = tuple(Variant(name, {}) for name in ("opcm", "task_arithmetic", "iso_c"))
PAIRS = len(INITS) * (len(AVERAGES) + 2 * len(SUMS)) - len(SUMS)  # from the base there is one way to count


@dataclass(frozen=True)
class Pair:
    """One init and deploy. accumulation, retention: by round, the mean over the eight tasks and over those held out."""

    init: str
    deploy: str
    replay: bool
    relative_to: str
    accumulation: Sequence[float]
    retention: Sequence[float]


def pairs(
    family: Family,
    *,
    replay: bool,
    inits: Sequence[Variant] = INITS,
    rounds: Sequence[str] = ROUNDS,
    ready: bool = False,
) -> list[Pair]:
    """All of them; what is in the cache is not made again. ready: only what is there. Left out, too: what another
    process is at.
    """
    found = []
    for init in inits:
        served = {
            _path(family, pair, len(rounds)): (deploy, pair)
            for deploy in (*AVERAGES, *SUMS)
            for pair in _ways(init, deploy, replay)
        }
        missing = {path: one for path, one in served.items() if not path.exists()}
        if missing and not ready:
            with claimed(_folder(family, init, replay), wait=False) as mine:
                if mine:
                    trained = _sequence(family, init, replay, rounds)
                    for path, (deploy, pair) in missing.items():
                        _serve(path, pair, family, deploy, trained)
        found += [Pair(**json.loads(path.read_text())) for path in served if path.exists()]
    return found


def _ways(init: Variant, deploy: Variant, replay: bool) -> list[Pair]:
    """To be measured: relative to the base, and where that is another thing, to what an expert was trained from."""
    ways = ("base", "trained_from") if deploy in SUMS and init.name != "zero_shot" else ("base",)
    return [Pair(init.label, deploy.label, replay, way, [], []) for way in ways]


def _path(family: Family, pair: Pair, rounds: int) -> Path:
    name = f"{pair.init}--{pair.deploy}--{'replay' if pair.replay else 'plain'}--{pair.relative_to}--{rounds}.json"
    return family.cache / "time" / name.replace(" ", "-")


def _folder(family: Family, init: Variant, replay: bool) -> Path:
    return family.cache / "vision" / "time" / f"{init.label.replace(' ', '-')}{'-replay' if replay else ''}"


def _sequence(family: Family, init: Variant, replay: bool, rounds: Sequence[str]) -> list[tuple[Path, Path]]:
    """(what it started from, the expert) of each round."""
    folder = _folder(family, init, replay)
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


def _serve(path: Path, pair: Pair, family: Family, deploy: Variant, trained: Sequence[tuple[Path, Path]]) -> None:
    accumulation, retention = [], []
    with Stream(deploy.made(), family.base) as stream:
        for start, expert in trained:
            stream.take(expert, origin=start if pair.relative_to == "trained_from" else None)
            scores: Mapping[str, float] = vision.scores(stream.weights(), (*ROUNDS, *HELD_OUT), IMAGES)
            accumulation.append(fmean(scores[task] for task in ROUNDS))
            retention.append(fmean(scores[task] for task in HELD_OUT))
    note(asdict(replace(pair, accumulation=accumulation, retention=retention)), path)
