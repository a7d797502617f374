"""Tiny models for the tests: a base, and experts that are near it. The same seed gives the same bytes."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def write_base(path: Path, seed: int, hidden: int = 16) -> Path:
    """Writes a base: one file if `path` ends in .safetensors, otherwise a folder with weights and config.json."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {"embed_tokens.weight": torch.randn(24, hidden, generator=draw)}
    for layer in range(2):
        tensors |= {
            f"layers.{layer}.attention.weight": torch.randn(hidden, hidden, generator=draw),
            f"layers.{layer}.up.weight": torch.randn(2 * hidden, hidden, generator=draw),
            f"layers.{layer}.down.weight": torch.randn(hidden, 2 * hidden, generator=draw),
            f"layers.{layer}.norm.weight": torch.ones(hidden),
        }
    tensors["position_ids"] = torch.arange(hidden)
    return _write(path, tensors, {"model_type": "tiny", "hidden_size": hidden})


def write_expert(path: Path, base: Path, seed: int, scale: float = 0.01) -> Path:
    """Writes what fine-tuning `base` could have given: every floating weight moved by `scale` times N(0, 1)."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {
        name: tensor + scale * torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor
        for name, tensor in read_weights(base).items()
    }
    return _write(path, tensors, {"model_type": "tiny"})


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a model written here or published: a file, or a folder with one."""
    return load_file(path / WEIGHTS if path.is_dir() else path)


def _write(path: Path, tensors: dict[str, Tensor], config: dict[str, object]) -> Path:
    if path.suffix == ".safetensors":
        save_file(tensors, path)
        return path
    path.mkdir()
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
    (path / CONFIG).write_text(json.dumps(config))
    return path
