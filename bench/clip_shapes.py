"""Checkpoints in the exact shapes of CLIP ViT-B/32's vision tower, made offline: a base and N experts.

    python -m bench.clip_shapes FOLDER --experts 3 --seed 0      # FOLDER/base, FOLDER/expert-000, ... (350 MB each)

Only torch and safetensors are needed, because both sides of a comparison must be able to run this file. Names and
shapes are a function of the configuration's numbers; `AutoModel.from_pretrained` loads the folders it writes.

The base follows the architecture's own initialisation. An expert is the base plus a task vector made to look like a
real fine-tune in what a projection method depends on: a matrix moves by 1 to 2 % of its norm, along a decaying
spectrum over a floor of noise, and the experts share a part of their direction.

Every tensor has a random stream of its own, keyed by seed, checkpoint and name: the same seed gives the same bytes on
the same torch, whatever is written before it.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
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
class Shape:
    """The numbers of a CLIP vision configuration that decide names and shapes; the default is ViT-B/32."""

    hidden: int = 768
    mlp: int = 3072
    layers: int = 12
    heads: int = 12
    image: int = 224
    patch: int = 32

    def config(self) -> dict[str, object]:
        """The `config.json` that makes the folder loadable as a CLIPVisionModel."""
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.image,
            "patch_size": self.patch,
            "num_channels": 3,
            "projection_dim": 512,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "initializer_factor": 1.0,
            "initializer_range": INIT_STD,
        }


SMALL = Shape(hidden=64, mlp=256, layers=2, heads=4, image=64, patch=16)
"""The same names at a size that a laptop merges in a second, for trying a comparison out."""


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


def tensors(shape: Shape) -> dict[str, Init]:
    """Every tensor of the vision tower by name, in the order of the reference implementation."""
    hidden, mlp = shape.hidden, shape.mlp
    narrow = hidden**-0.5 * (2 * shape.layers) ** -0.5
    named: dict[str, Init] = {}

    def weight(name: str, size: tuple[int, ...], std: float) -> None:
        named[f"vision_model.{name}"] = Init(size, 0.0, std)

    def linear(name: str, rows: int, columns: int, std: float) -> None:
        weight(f"{name}.weight", (rows, columns), std)
        weight(f"{name}.bias", (rows,), 0.0)

    def norm(name: str) -> None:
        named[f"vision_model.{name}.weight"] = Init((hidden,), 1.0, 0.0)
        weight(f"{name}.bias", (hidden,), 0.0)

    weight("embeddings.class_embedding", (hidden,), hidden**-0.5)
    weight("embeddings.patch_embedding.weight", (hidden, 3, shape.patch, shape.patch), INIT_STD)
    weight("embeddings.position_embedding.weight", ((shape.image // shape.patch) ** 2 + 1, hidden), INIT_STD)
    norm("pre_layrnorm")
    for index in range(shape.layers):
        layer = f"encoder.layers.{index}"
        for projection in ("k_proj", "v_proj", "q_proj"):
            linear(f"{layer}.self_attn.{projection}", hidden, hidden, narrow)
        linear(f"{layer}.self_attn.out_proj", hidden, hidden, hidden**-0.5)
        norm(f"{layer}.layer_norm1")
        linear(f"{layer}.mlp.fc1", mlp, hidden, (2 * hidden) ** -0.5)
        linear(f"{layer}.mlp.fc2", hidden, mlp, narrow)
        norm(f"{layer}.layer_norm2")
    norm("post_layernorm")
    return named


def base_tensors(shape: Shape, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """The base, one float32 tensor at a time."""
    for name, init in tensors(shape).items():
        yield name, init.mean + init.std * _normal(init.shape, seed, "base", name)


def expert_tensors(shape: Shape, seed: int, index: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Expert `index` (from 0), one float32 tensor at a time; the base is drawn again, not kept."""
    draw = torch.rand((), generator=_generator(seed, f"expert {index}", "strength")).item()
    strength = STRENGTH[0] + (STRENGTH[1] - STRENGTH[0]) * draw
    for name, weight in base_tensors(shape, seed):
        own = _direction(weight.shape, seed, f"expert {index}", name)
        common = _direction(weight.shape, seed, "common", name)
        step = (1 - SHARED) ** 0.5 * own + SHARED**0.5 * common
        yield name, weight + strength * tensors(shape)[name].yardstick * step


def write(folder: Path | str, experts: int = 3, seed: int = 0, shape: Shape | None = None) -> list[Path]:
    """Write `folder`/base and `folder`/expert-000 ..., each a Hugging Face folder; return them, the base first.

    One checkpoint is in memory at a time. Existing files of the same names are replaced.
    """
    shape = shape or Shape()
    folder = Path(folder)
    return [_save(folder / "base", shape, base_tensors(shape, seed))] + [
        _save(folder / f"expert-{index:03d}", shape, expert_tensors(shape, seed, index)) for index in range(experts)
    ]


def _direction(shape: torch.Size, seed: int, who: str, name: str) -> torch.Tensor:
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


def _save(folder: Path, shape: Shape, stream: Iterator[tuple[str, torch.Tensor]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2) + "\n")
    save_file(dict(stream), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def main() -> None:
    """Write the checkpoints named on the command line and print their folders."""
    parser = argparse.ArgumentParser(description="Write CLIP-ViT-B/32-shaped checkpoints: a base and its experts.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="two narrow layers instead of the real size")
    options = parser.parse_args()
    for folder in write(options.folder, options.experts, options.seed, SMALL if options.small else Shape()):
        print(folder)


if __name__ == "__main__":
    main()
