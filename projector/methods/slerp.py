"""Spherical interpolation, one expert after the other."""

from dataclasses import dataclass
from math import acos, sin, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from projector.algebra.linalg import ENERGY_NUMEL, pieces
from projector.method import Contribution, Method, State, Sums, Totals, param
from projector.spec import TensorSpec


@dataclass(frozen=True)
class Slerp(Method):
    """Turns the running model 1/t of the angle towards each new expert.

    With Omega the angle between the two tensors taken as vectors:

        m_t = sin((1 - 1/t) Omega) / sin(Omega) * m_{t-1} + sin(1/t Omega) / sin(Omega) * theta_t

    Two experts give slerp at 0.5 of them. More give an incremental mean on the sphere, not a joint one: it depends on
    their order. Scalars, a tensor that is zero, and tensors that are nearly parallel or opposed
    (|cos Omega| > dot_threshold) are interpolated along the straight line, which makes them the plain average.

    The state is the running model less the base, m_t - theta_0, so that small changes keep their digits. A tensor is
    taken whole, which for an embedding of 128256 x 4096 is about 16 GiB of memory; `init` refuses one that does not
    fit, with both numbers.

    >>> slerp, base = Slerp(), torch.zeros(1, 2)
    >>> spec, state = TensorSpec("w", (1, 2), torch.float32), {"A": torch.zeros(1, 2)}
    >>> for t, weights in enumerate([[[1.0, 0.0]], [[0.0, 1.0]]], start=1):
    ...     state, _ = slerp.update({**state, "base": base}, torch.tensor(weights), spec, Contribution(t))
    >>> slerp.read(base, state, Totals(2), spec)
    tensor([[0.7071, 0.7071]])
    """

    name = "slerp"
    formula = "m_t = slerp(m_{t-1}, theta_t, 1/t) per tensor on raw weights, m_0 = base"
    paper = "Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985"
    wants_base: ClassVar[bool] = True

    dot_threshold: float = param(0.9995, "|cos| above which the straight line is taken", low=0, high=0.999999)

    @property
    def one_sweep(self) -> bool:
        return True

    def elementwise(self, spec: TensorSpec) -> bool:
        return not spec.shape

    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        old, new, base, step = state["A"], delta, state["base"], 1 / expert.index
        cosine = 1.0 if self.elementwise(spec) else _cosine(base, old, new)
        if abs(cosine) > self.dot_threshold:
            return {"A": torch.lerp(input=old, end=new, weight=step)}, {}
        angle = acos(cosine)
        keep, take = sin((1 - step) * angle) / sin(angle), sin(step * angle) / sin(angle)
        # keep * (base + old) + take * (base + new) - base
        merged = torch.mul(old, keep).add_(new, alpha=take).add_(base, alpha=keep + take - 1)
        return {"A": merged}, {}

    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        return torch.add(base, state["A"])


def _cosine(base: Tensor, old: Tensor, new: Tensor) -> float:
    """The cosine between base + old and base + new, whole, in float64; 1 where one of them is zero."""
    dot = torch.zeros(3, dtype=torch.float64, device=base.device)
    for part in pieces(base, ENERGY_NUMEL):
        base_P, old_P, new_P = (tensor.reshape(-1)[part] for tensor in (base, old, new))
        x_P, y_P = base_P.double() + old_P, base_P.double() + new_P
        dot += torch.stack([torch.dot(x_P, x_P), torch.dot(y_P, y_P), torch.dot(x_P, y_P)])
    xx, yy, xy = dot.tolist()
    return xy / sqrt(xx * yy) if xx and yy else 1.0
