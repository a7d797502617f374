"""Is what a device computes right, whatever happens to it: the steps `exact`, `daemon`, `memory` and `fold` of gpu.sh.

    python -m bench.gpu_checks exact --device cuda

`exact`: every registered method through the driver on the device and on the CPU, the same stream of experts; how far
the merged task vectors are apart, relative to their length. `daemon`: a real daemon on the device merges three experts
by OPCM, and then, with a device budget of one byte, one more. `memory`: where the device has no room, or the budget
allows none, the bits are the CPU's. `fold`: one small fold, for the sanitizer. Prints a JSON object a line.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import llama_shapes
from bench.live import drop, make_home, scratch
from bench.record import ROOT
from bench.shapes import write
from daemon.compute.resources import exact_products
from projector.driver.device import Accelerator, Cuda, Device
from projector.driver.fold import Driver
from projector.files.slabs import SLAB_BYTES, Slabs
from projector.laws.trial import Tensors, merge, stream
from projector.methods import make, methods
from projector.watch import Watch

TOLERANCE = 1e-5
EXPERTS = 3
SIDES = (384, 512)
TINY_SIDES = (24, 32)
BUDGET = 16 << 30
SLABS = 64
FELL_BACK = "computed on the CPU"
WORK = ROOT / "bench-work" / "gpu"
LAYERS = replace(llama_shapes.Shape(), layers=2)


class Listening(Watch):
    """Counts what was computed on the CPU."""

    def __init__(self) -> None:
        self.count = 0

    def fell_back(self, name: str, why: str) -> None:
        self.count += 1


def exact(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    base, experts = _stream(small)
    heard = Listening()
    driver = Driver(_device(device), workers=2, watch=heard)
    bad = []
    for name in methods():
        try:
            here, there, again = (merge(make(name), base, experts, one)[0] for one in (Driver(), driver, driver))
        except RuntimeError as error:  # the others are to be known all the same
            yield {name: {"error": str(error), "good": False}}
            bad.append(name)
            continue
        whole = _norm({key: here[key].double() - base[key].double() for key in base})
        apart = _norm({key: there[key].double() - here[key].double() for key in base})
        apart = apart / whole if whole else apart  # a method may give the base itself
        same = all(torch.equal(there[key], again[key]) for key in base)
        good = apart <= TOLERANCE and same
        yield {name: {"apart": apart, "same_bits_again": same, "good": good}}
        if not good:
            bad.append(name)
    yield {"fallbacks": heard.count}
    if bad:
        raise SystemExit(f"not as on the CPU: {', '.join(bad)}")


def memory(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    base, experts = _stream(small)
    here = merge(make("opcm"), base, experts, Driver())[0]
    heard = Listening()
    there = merge(make("opcm"), base, experts, Driver(_device(device, 1), watch=heard))[0]
    yield {"beyond the budget": {"fallbacks": heard.count, "the_cpus_bits": _same(here, there)}}
    if device.type == "cuda":
        heard = Listening()
        card = _device(device)
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1e-5)  # less than a matrix
        try:
            there = merge(make("opcm"), base, experts, Driver(card, watch=heard))[0]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        yield {"out of memory": {"fallbacks": heard.count, "the_cpus_bits": _same(here, there)}}
        heard = Listening()
        merge(make("opcm"), base, experts, Driver(_device(device), watch=heard))
        yield {"afterwards": {"fallbacks": heard.count}}


def fold(device: torch.device, _: bool) -> Iterator[dict[str, Any]]:
    base, experts = stream(2)
    merged = merge(make("opcm"), base, experts, Driver(_device(device)))[0]
    yield {"finite": all(bool(x.isfinite().all()) for x in merged.values())}


def daemon(device: torch.device, small: bool) -> Iterator[dict[str, Any]]:
    """A daemon drains its inbox and ends: seconds, what it said of its device, how often it fell back on the CPU."""
    shape = llama_shapes.SMALL if small else LAYERS
    WORK.mkdir(parents=True, exist_ok=True)
    with scratch(WORK / "base") as folder:
        base, *experts = write(folder, EXPERTS + 1, 0, shape.model())
        home = make_home(folder, base, "opcm")
        for budget, some in ((0, experts[:EXPERTS]), (1, experts[EXPERTS:])):
            for expert in some:
                drop(home, expert)
            said, taken = _drained(home.root, device, budget)
            yield {
                "all on the device" if not budget else "nothing fits on the device": {
                    "seconds": taken,
                    "merged": len(re.findall(r'"event": "merged"', said)),
                    "fallbacks": said.count(f'"event": "{FELL_BACK}"'),
                    "device": re.findall(r'"event": "(computing on [^"]*)"', said),
                    "version": int(home.latest("main").readlink().name),
                }
            }


def _drained(home: Path, device: torch.device, budget: int) -> tuple[str, float]:
    started = time.perf_counter()
    ran = subprocess.run(
        [sys.executable, "-m", "daemon", "run", "--home", str(home), "--once", "--no-http", "--device", str(device)],
        cwd=ROOT,
        env=_environment(budget),
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise SystemExit(f"the daemon ended with {ran.returncode}: {ran.stderr[-1500:]}")
    return ran.stderr, time.perf_counter() - started


def _environment(budget: int) -> Mapping[str, str]:
    return {**os.environ, "MAINSTEM_LOG__FORMAT": "json", "MAINSTEM_COMPUTE__DEVICE_BUDGET": str(budget)}


def _device(where: torch.device, budget: int = BUDGET) -> Device:
    """The device; in a rehearsal with a budget, a card on which nothing fits."""
    if where.type == "cuda":
        slabs = Slabs(torch.empty(SLABS * SLAB_BYTES, dtype=torch.uint8, pin_memory=True))
        return Cuda(where, budget, slabs)
    return Device() if budget == BUDGET else Accelerator(where, budget)


def _stream(small: bool) -> tuple[Tensors, list[Tensors]]:
    """The laws' stream, and two larger matrices, of which one moves by task vectors of low rank."""
    base, experts = stream(EXPERTS)
    rows, columns = TINY_SIDES if small else SIDES
    draw = torch.Generator().manual_seed(1)
    more = {f"{name}.weight": torch.randn(rows, columns, generator=draw) for name in ("full", "low")}
    moved = []
    for expert in experts:
        full = torch.randn(rows, columns, generator=draw)
        low = torch.randn(rows, 4, generator=draw) @ torch.randn(4, columns, generator=draw)
        both = {"full.weight": full, "low.weight": low}
        moved.append({**expert, **{name: more[name] + 1e-2 * delta for name, delta in both.items()}})
    return {**base, **more}, moved


def _norm(tensors: Tensors) -> float:
    return float(sum(x.square().sum() for x in tensors.values())) ** 0.5


def _same(here: Tensors, there: Tensors) -> bool:
    return all(torch.equal(here[key], there[key]) for key in here)


def main() -> None:
    steps = {"exact": exact, "memory": memory, "fold": fold, "daemon": daemon}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=steps)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--shapes", nargs="*", help="taken and not used: every step is given the same words")
    options = parser.parse_args()
    exact_products()
    for found in steps[options.step](options.device, options.small):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
