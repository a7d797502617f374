"""The demo's evaluator, a program of its own as any is: it reads a model from a folder and prints its scores.

    python -m daemon.demo.score FOLDER DIGITS

DIGITS is what `digits.save_held_out` wrote. The network is worked out in numpy: torch takes seconds to start. The
centre is what the base knew before any expert came, and no expert is for it: it is held out.
"""

import json
import sys
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

LABELS, HELD_OUT = "labels", "centre"
EPSILON = 1e-5  # of torch's LayerNorm


def scores(folder: Path, digits: Path) -> dict[str, dict[str, Any]]:
    """By task: the share of held-out digits that the model in `folder` reads, of how many, and its standard error."""
    weights: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        weights |= load_file(path)
    held_out = load_file(digits)
    labels = held_out.pop(LABELS)
    read = {
        task: float((_logits(weights, levels).argmax(axis=1) == labels).mean()) for task, levels in held_out.items()
    }
    n = len(labels)
    return {
        task: {"score": share, "n": n, "stderr": sqrt(share * (1 - share) / n), "held_out": task == HELD_OUT}
        for task, share in read.items()
    }


def _logits(weights: dict[str, Any], levels: Any) -> Any:
    """(n, 24, 24) grey levels to (n, 10)."""
    x = levels.reshape(len(levels), -1).astype(np.float32) / 16
    for layer in ("1", "2"):
        x = x @ weights[f"hidden{layer}.weight"].T + weights[f"hidden{layer}.bias"]
        x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + EPSILON)
        x = np.maximum(x * weights[f"norm{layer}.weight"] + weights[f"norm{layer}.bias"], 0)
    return x @ weights["head.weight"].T + weights["head.bias"]


if __name__ == "__main__":
    print(json.dumps(scores(Path(sys.argv[1]), Path(sys.argv[2]))))
