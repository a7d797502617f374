"""Which method when, on real experts: makes them, runs every stream, writes bench/results/quality.json.

    python -m bench.quality --cache build/quality               everything; goes on if stopped
    python -m bench.quality --cache build/quality --only grid   one block: experts, readers, encoders, growth, ...
    python -m bench.quality --cache build/quality --collect     only the results file, from what is in the cache
    python -m bench.quality.report                              docs/quality.md from the results file

It needs `pip install 'mainstem[quality]'`, and no network. A process for each core, which share the cache: what one of
them is making, the others leave to it.
"""

import argparse
import json
import os
import resource
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache as cache_once
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from bench.quality import blocks, vision
from bench.quality.blocks import Maker
from bench.quality.experts import make_experts
from bench.quality.family import Family, adapters, demo, encoder_adapters, encoders, halves, readers
from bench.quality.learning import Course
from bench.record import RESULTS

CACHE = Path("build") / "quality"
TEXTS = 150  # of each encoder's task
ENCODER_ORDERS = 5  # an order of an encoder takes minutes, one of a reader seconds
LEARNED = [Course(0.001, 500), Course(0.01, 500), Course(0.1, 500), Course(0.01, 500, of=4)]
ENCODERS_LEARNED = [Course(0.001, 100), Course(0.01, 100)]


def blocks_over(cache: Path, maker: Maker) -> Mapping[str, Callable[[], Any]]:
    """By name, what gives its part of the results."""

    @cache_once
    def sentence() -> Family:
        return encoders(cache, TEXTS)

    def reader(tasks: Sequence[str] = vision.TRAINED) -> Family:
        return readers(cache, tasks, ready=maker.ready)

    return {
        "experts": lambda: None if maker.ready else make_experts(cache),
        "readers": lambda: blocks.streams(reader(), maker),
        "grid": lambda: blocks.grid(reader(), maker, replay=False),
        "encoders": lambda: blocks.streams(sentence(), maker, orders=1, whole=False),
        "sensitivity": lambda: blocks.sensitivity(reader(), maker),
        "growth": lambda: blocks.growth(reader(vision.TASKS), maker),
        "adapters": lambda: blocks.streams(adapters(cache, ready=maker.ready), maker, orders=3),
        "routed": lambda: blocks.routed(reader(vision.TASKS), maker),
        "learned": lambda: blocks.learned(reader(vision.TASKS), maker, LEARNED),
        "demo_learned": lambda: blocks.learned(demo(cache, ready=maker.ready), maker, LEARNED),
        "grid_replay": lambda: blocks.grid(reader(), maker, replay=True),
        "encoder_orders": lambda: blocks.streams(sentence(), maker, orders=ENCODER_ORDERS, whole=False),
        "encoder_sensitivity": lambda: blocks.sensitivity(sentence(), maker),
        "encoder_growth": lambda: blocks.growth(sentence(), maker),
        "encoder_routed": lambda: blocks.routed(sentence(), maker),
        "encoder_learned": lambda: blocks.learned(sentence(), maker, ENCODERS_LEARNED),
        "encoder_adapters": lambda: blocks.streams(
            encoder_adapters(cache, TEXTS, ready=maker.ready), maker, orders=1, whole=False
        ),
        "halves": lambda: blocks.growth(halves(cache, TEXTS, ready=maker.ready), maker, [32]),
    }


def main() -> None:
    """The command."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("--cache", type=Path, default=CACHE, help=f"where experts and cells are kept ({CACHE})")
    command.add_argument("--out", type=Path, default=RESULTS, help="folder for quality.json (bench/results)")
    command.add_argument("--only", action="append", default=[], help="this block; may be given several times")
    command.add_argument("--processes", type=int, default=os.cpu_count(), help="at once (a process for each core)")
    command.add_argument("--collect", action="store_true", help="make nothing, write what is there")
    asked = command.parse_args()
    begun = monotonic()
    if not asked.collect:
        with ProcessPoolExecutor(asked.processes, get_context("spawn")) as pool:
            for part in [pool.submit(fill, asked.cache, asked.only) for _ in range(asked.processes)]:
                part.result()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        print(f"{(monotonic() - begun) / 60:.0f} min, of CPU {(used.ru_utime + used.ru_stime) / 60:.0f} min")
    (asked.out / "quality.json").write_text(json.dumps(collected(asked.cache), indent=1, sort_keys=True) + "\n")


def fill(cache: Path, only: Sequence[str] = ()) -> None:
    """One process's part of making these blocks, or all of them."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    making = blocks_over(cache, Maker(False, lambda text: print(text, flush=True)))
    for name in only or making:
        print(f"== {name}", flush=True)
        making[name]()


def collected(cache: Path) -> dict[str, Any]:
    """All parts, from what is in the cache; None where experts are missing."""
    parts: dict[str, Any] = {
        "command": "python -m bench.quality",
        "software": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "missing": {},
    }
    maker = Maker(True, lambda _: None)
    for name, part in blocks_over(cache, maker).items():
        if name == "experts":
            continue
        maker.missing = 0
        try:
            parts[name] = part()
        except FileNotFoundError:
            parts[name] = None
        parts["missing"][name] = maker.missing
    parts["experts"] = {path.stem: json.loads(path.read_text()) for path in sorted((cache / "scores").glob("*.json"))}
    return parts


if __name__ == "__main__":
    main()
