"""Folds experts one after the other with every method; prints the peak of resident memory for each, as JSON.

python -m tests.memory.fold_many COUNT
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from projector.laws.trial import Tensors, merge
from projector.methods import make
from tests.memory.fold_once import memory

SHAPES = {"embed.weight": (4096, 256), "bias": (256,), **{f"layers.{i}.weight": (256, 256) for i in range(4)}}


def model(seed: int) -> Tensors:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def measured(count: int, peaks: list[int]) -> Iterator[Tensors]:
    """The experts; while each is folded the peak starts over, and when the next is asked for it is noted."""
    base = model(0)
    for seed in range(1, count + 1):
        expert = {name: base[name] + 0.1 * tensor for name, tensor in model(seed).items()}
        Path("/proc/self/clear_refs").write_text("5")
        yield expert
        peaks.append(memory("VmHWM"))


def main() -> None:
    torch.set_num_threads(1)
    found: dict[str, list[int]] = {}
    for name in sys.argv[2:]:
        found[name] = []
        merge(make(name), model(0), measured(int(sys.argv[1]), found[name]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
