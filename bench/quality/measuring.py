"""What is made, block by block, and the results file from what is in the cache."""

import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache as cache_once
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from bench.quality import blocks, vision
from bench.quality.blocks import Maker
from bench.quality.experts import make_experts
from bench.quality.family import Family, adapters, demo, encoder_adapters, encoders, halves, light, readers
from bench.quality.learning import Course

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
        "encoders": lambda: blocks.streams(sentence(), maker, orders=1, whole=False),
        "encoder_orders": lambda: blocks.streams(sentence(), maker, orders=ENCODER_ORDERS, whole=False),
        "encoder_growth": lambda: blocks.growth(sentence(), maker),
        "encoder_adapters": lambda: blocks.streams(
            encoder_adapters(cache, TEXTS, ready=maker.ready), maker, orders=1, whole=False
        ),
        "light": lambda: blocks.streams(light(cache, TEXTS, ready=maker.ready), maker, orders=1, whole=False),
        "growth": lambda: blocks.growth(reader(vision.TASKS), maker),
        "adapters": lambda: blocks.streams(adapters(cache, ready=maker.ready), maker, orders=3),
        "sensitivity": lambda: blocks.sensitivity(reader(), maker),
        "routed": lambda: blocks.routed(reader(vision.TASKS), maker),
        "learned": lambda: blocks.learned(reader(vision.TASKS), maker, LEARNED),
        "demo_learned": lambda: blocks.learned(demo(cache, ready=maker.ready), maker, LEARNED),
        "encoder_routed": lambda: blocks.routed(sentence(), maker),
        "encoder_learned": lambda: blocks.learned(sentence(), maker, ENCODERS_LEARNED),
        "encoder_sensitivity": lambda: blocks.sensitivity(sentence(), maker),
        "grid": lambda: blocks.grid(reader(), maker, replay=False),
        "grid_replay": lambda: blocks.grid(reader(), maker, replay=True),
        "halves": lambda: blocks.growth(halves(cache, TEXTS, ready=maker.ready), maker, [32]),
    }


def fill(cache: Path, names: Sequence[str], processes: int) -> None:
    """Makes these blocks, by so many processes."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for part in [pool.submit(_fill, cache, names) for _ in range(processes)]:
            part.result()


def _fill(cache: Path, names: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    making = blocks_over(cache, Maker(False, lambda text: print(text, flush=True)))
    for name in names:
        print(f"== {name}", flush=True)
        making[name]()


def collected(cache: Path, before: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """All parts, from what is in the cache; None where experts are missing.

    before: what the results file has. A part of which the cache has less stays as it is there, and is named in
    "earlier": its experts were trained another time, maybe on another machine, whose rounding is another.
    """
    parts: dict[str, Any] = {
        "command": "python -m bench.quality",
        "software": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "missing": {},
        "earlier": [],
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
        if before.get(name) and (not parts[name] or maker.missing > before["missing"][name]):
            parts[name], parts["missing"][name] = before[name], before["missing"][name]
            parts["earlier"].append(name)
    noted = {path.stem: json.loads(path.read_text()) for path in sorted((cache / "scores").glob("*.json"))}
    parts["experts"] = noted or before.get("experts", {})
    return parts
