"""AdaMerging: a coefficient for each tensor and expert, learned on batches without labels, in this process.

The arithmetic is `mainstem rebuild --adamerging`'s, and the entropy that of daemon.adamerging; what runs the model is
not a process of its own here.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import process_time
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from bench.quality.family import Family
from daemon.adamerging import entropy
from daemon.checkpoints.checkpoint import open_path
from daemon.rebuild.learning import METHOD, fallen
from projector.algebra.linalg import one_thread
from projector.driver.adamerging import Adamerging
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.methods import make

BUDGET_BYTES = 1 << 30


@dataclass(frozen=True)
class Course:
    """How to learn. of: of how many of the tasks there are batches, the first ones; all, if None."""

    lr: float
    steps: int
    of: int | None = None

    @property
    def label(self) -> str:
        """For people."""
        return f"lr={self.lr:g}, {self.steps} steps" + (f", batches of {self.of} of the tasks" if self.of else "")


@one_thread()
def learned(family: Family, order: Sequence[str], course: Course) -> dict[str, Any]:
    """After the last step: the scores by task, the mean entropy of the first and of the last steps, summed over tasks,
    each expert's mean coefficient, and the CPU seconds of a step.
    """
    tasks = family.learned(order)
    model, started = family.runs.model(), process_time()
    with ExitStack() as files:
        base, *experts = (
            files.enter_context(open_path(path)).tensors
            for path in (family.base, *(family.experts[name] for name in order))
        )
        start = float(make(METHOD).params()["scale"])
        merged = Adamerging(base, experts, [1.0] * len(order), start, lr=course.lr, budget_bytes=BUDGET_BYTES)
        writer = TensorWriter(files.enter_context(tempfile.TemporaryFile()).fileno(), merged.specs, {})
        merged.sweep([writer], hashed=False)
        entropies = []
        for step in range(course.steps):
            put(model, writer.reader())
            loss = torch.stack([entropy(family.runs.logits(model, task, step)) for task in tasks[: course.of]]).sum()
            loss.backward()  # type: ignore[no-untyped-call]
            entropies.append(loss.item())
            with tempfile.TemporaryFile() as file:
                file.write(slopes(model))
                file.flush()
                merged.sweep([writer], Checkpoint([TensorReader(file.fileno())]), hashed=False)
        seconds = process_time() - started
        found = writer.reader()
        scores = family.score({name: found.read(name) for name in found.specs}, tasks)
    return {
        "scores": dict(scores),
        "entropy": fallen(entropies),
        "mean": merged.coefficients.clamped.mean(dim=0).tolist(),
        "seconds": seconds / course.steps,
    }


def put(model: nn.Module, weights: TensorReader) -> None:
    """The merged weights into the model, without gradients yet."""
    known = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name in weights.specs:
            known[name].copy_(weights.read(name))
            known[name].grad = None


def slopes(model: nn.Module) -> bytes:
    """The gradients as a safetensors file."""
    return save({name: one.grad for name, one in model.named_parameters() if one.grad is not None})
