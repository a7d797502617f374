"""Checkpoints of an architecture's exact names and shapes, made offline: a base, and experts that look fine-tuned.

The base follows the architecture's own initialisation. An expert is the base plus a task vector made to look like a
real fine-tune in what a projection method depends on: a matrix moves by 1 to 2 % of its norm, along a decaying
spectrum over a floor of noise, and the experts share a part of their direction.

Every tensor has a random stream of its own, keyed by seed, checkpoint and name: the same seed gives the same bytes on
the same torch, whatever is written before it.

Only torch and safetensors are needed, because both sides of a comparison must be able to run this file.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

INIT_STD = 0.02
"""Standard deviation of the embeddings, and the yardstick for tensors that start as a constant (biases, norms)."""
DECAY = 0.7
"""Exponent of the power law behind a task vector's leading directions, half as many as the smaller side has."""
NOISE = 0.3
"""Share of a task vector's size that is plain noise. With DECAY it puts half of the nuclear mass into the first 14 to
19 % of the directions (18 % was measured on really fine-tuned encoders), at a condition of up to 1e5."""
SHARED = 0.1
"""Cosine between the task vectors of any two experts (expected value)."""
STRENGTH = (0.01, 0.02)
"""How far an expert moves, as a share of the base's own scale: drawn evenly between the two."""


@dataclass(frozen=True)
class Init:
    """How one tensor of the base starts: normal(mean, std); std 0 is a constant."""

    shape: tuple[int, ...]
    mean: float
    std: float

    @property
    def yardstick(self) -> float:
        """Size of one element against which a fine-tuned change is measured."""
        return self.std or INIT_STD


@dataclass(frozen=True)
class Model:
    """What a folder of this architecture holds: its `config.json`, and every tensor by name."""

    config: Mapping[str, object]
    tensors: Mapping[str, Init]
    dtype: torch.dtype = torch.float32

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(math.prod(init.shape) for init in self.tensors.values())


def write(folder: Path, experts: int, seed: int, model: Model) -> list[Path]:
    """Write `folder`/base and `folder`/expert-000 ..., each a Hugging Face folder; return them, the base first.

    One checkpoint is in memory at a time. Existing files of the same names are replaced.
    """
    return [_save(folder / "base", model, _base(model, seed))] + [
        _save(folder / f"expert-{index:03d}", model, _expert(model, seed, index)) for index in range(experts)
    ]


def command_line(description: str, real: Model, small: Model) -> None:
    """Write the checkpoints named on the command line and print their folders."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="two narrow layers instead of the real size")
    options = parser.parse_args()
    for folder in write(options.folder, options.experts, options.seed, small if options.small else real):
        print(folder)


def _base(model: Model, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The base, one float32 tensor at a time."""
    for name, init in model.tensors.items():
        yield name, init.mean + init.std * _normal(init.shape, seed, "base", name)


def _expert(model: Model, seed: int, index: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Expert `index` (from 0), one float32 tensor at a time; the base is drawn again, not kept."""
    draw = torch.rand((), generator=_generator(seed, f"expert {index}", "strength")).item()
    strength = STRENGTH[0] + (STRENGTH[1] - STRENGTH[0]) * draw
    for name, weight in _base(model, seed):
        own = direction(weight.shape, seed, f"expert {index}", name)
        common = direction(weight.shape, seed, "common", name)
        step = (1 - SHARED) ** 0.5 * own + SHARED**0.5 * common
        yield name, weight + strength * model.tensors[name].yardstick * step


def direction(shape: torch.Size, seed: int, who: str, name: str) -> torch.Tensor:
    """A random change whose elements have mean square 1; matrices decay, then noise."""
    if len(shape) != 2:
        return _normal(tuple(shape), seed, who, name)
    rows, columns = shape
    rank = min(rows, columns) // 2
    left = _normal((rows, rank), seed, f"{who} left", name)
    right = _normal((rank, columns), seed, f"{who} right", name)
    spectrum = torch.arange(1, rank + 1, dtype=torch.float32).pow(-DECAY)
    leading = (left * spectrum) @ right  # (rows, rank) * (rank,) @ (rank, columns)
    leading *= (rows * columns) ** 0.5 / torch.linalg.vector_norm(leading)
    return math.sqrt(1 - NOISE**2) * leading + NOISE * _normal((rows, columns), seed, f"{who} noise", name)


def _normal(shape: tuple[int, ...], seed: int, who: str, name: str) -> torch.Tensor:
    return torch.randn(shape, generator=_generator(seed, who, name))


def _generator(seed: int, who: str, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\n{who}\n{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _save(folder: Path, model: Model, stream: Iterator[tuple[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(model.config), indent=2) + "\n")
    weights = {name: tensor.to(model.dtype) for name, tensor in stream}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
