"""DARE: drop values at random, rescale the others."""

import json
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from projector.algebra.linalg import ENERGY_NUMEL, pieces
from projector.method import Contribution, Method, idle, param
from projector.methods._thinning import Thinning
from projector.methods.task_arithmetic import TaskArithmetic
from projector.methods.ties import Ties
from projector.spec import TensorSpec

GOLDEN = 0x9E3779B97F4A7C15  # splitmix64: Steele, Lea and Flood, Fast splittable pseudorandom number generators
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB


@dataclass(frozen=True)
class Dare(Thinning):
    """Drops values of a task vector at random, scales up the others, and merges them.

    What is dropped is drawn from the expert's sha256, the tensor's name, the seed and the value's place in the tensor,
    by integer arithmetic alone: a replay, a retry, other blocks and another device draw the same. Merged by
    task_arithmetic ("linear") or by ties, which sets `scale`, `density` and `combine` as they are named there; ties
    trims nothing at density 1, and has nothing to trim where density is not below 1 - drop.
    """

    name = "dare"
    formula = "task_arithmetic or ties of mask * tau / (1 - drop), mask ~ Bernoulli(1 - drop)"
    paper = "Yu et al., DARE, arXiv 2311.03099"
    keyed = True

    drop: float = param(0.9, "probability that a value is dropped", low=0, high=0.99)
    then: str = param("linear", "how the rest is merged; linear: task_arithmetic", choices=("linear", "ties"))
    scale: float = param(0.3, "factor of the merged task vector", low=-10, high=10, idle=0)
    density: float = param(1.0, "ties: share of the model's values kept, the largest", low=0, high=1)
    combine: str = param("mean", "ties: what the values of the elected sign become", choices=("mean", "sum", "max"))
    seed: int = param(0, "draws other masks", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.then == "ties" and not self.density:
            raise idle(self.name, "density", self.density, "0 to 1 but not 0")

    @property
    def grows(self) -> bool:
        return True

    @property
    def merging(self) -> Method:
        if self.then == "linear":
            return TaskArithmetic(scale=self.scale)
        return Ties(density=self.density, combine=self.combine, scale=self.scale)

    def elementwise(self, spec: TensorSpec) -> bool:
        return True

    def thin(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Tensor:
        key = stream_key(expert.sha256, spec.name, self.seed)
        first = spec.start * spec.row_numel
        dropped_below = int(self.drop * 2**64) - 2**63
        thinned = torch.empty(delta.shape, device=delta.device)
        for part in pieces(delta, ENERGY_NUMEL):
            bits = random_bits(key, first + part.start, part.stop - part.start, delta.device)
            torch.mul(delta.reshape(-1)[part], bits >= dropped_below, out=thinned.view(-1)[part])
        return thinned.mul_(1 / (1 - self.drop))


def stream_key(expert: str, tensor: str, seed: int) -> int:
    """The start of a tensor's stream of random numbers: 64 bits of a hash of what they shall depend on."""
    return int.from_bytes(sha256(json.dumps([expert, tensor, seed]).encode()).digest()[:8], "big")


def random_bits(key: int, start: int, count: int, device: torch.device) -> Tensor:
    """(count,) int64, uniform over all 64 bits: the numbers `start`, `start` + 1, ... of the splitmix64 stream `key`.

    Number i is a mix of key + (i + 1) * GOLDEN modulo 2^64, so that any part of a stream is had at once.
    """
    z = torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=device)
    z.mul_(_signed(GOLDEN)).add_(_signed(key))
    z.bitwise_xor_(_shifted(z, 30)).mul_(_signed(FIRST_FACTOR))
    z.bitwise_xor_(_shifted(z, 27)).mul_(_signed(SECOND_FACTOR))
    return z.bitwise_xor_(_shifted(z, 31))


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by as of unsigned numbers; torch fills up with the sign."""
    return (z >> by).bitwise_and_((1 << 64 - by) - 1)


def _signed(x: int) -> int:
    """The int64 that has the bits of a 64-bit unsigned x."""
    return x - (x >> 63 << 64)
