"""Scales by layer, for any method: LiNeS's rule on each arriving task vector.

LARV (Wang et al., arXiv 2602.09413) has two or three scales for tiers of layers, by their effective ranks; the tiers'
values and its second measure stand in no text that could be read, so that it is not here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from torch import Tensor

from projector.algebra.linalg import energy
from projector.method import Contribution, Method, State, Sums, Survey, idle, param
from projector.spec import TensorSpec

ALPHA, BETA = "layer_alpha", "layer_beta"


def is_layered(params: Mapping[str, Any]) -> bool:
    """Whether these are a head's parameters with scales by layer."""
    return ALPHA in params or BETA in params


def layer_scales(params: Mapping[str, Any]) -> tuple[float, float]:
    """Of such parameters, the factors of task vectors in the first layer and in the last."""
    return params[ALPHA], params[ALPHA] + params[BETA]


@cache
def layered(cls: type[Method]) -> type[Method]:
    """The method with two parameters more, `layer_alpha` and `layer_beta`, which folds every task vector as

        (layer_alpha + layer_beta * depth) * tau        depth: 0 in the first layer, 1 in the last

    and by layer_alpha what lies in no list of layers, as LiNeS has it (Wang et al., arXiv 2410.17146). Running
    statistics are left alone, which no scale applies to.

    The task vector is scaled before the method sees it, and not what is read out, so that any method takes it, with its
    norms, its thresholds and its records of experts, and keeps its laws: to the method the expert is one that moved
    less in its first layers. For what is homogeneous in each tensor (sums, means, iso_c, tsv_m) both are the same.
    """

    @dataclass(frozen=True)
    class Layered(cls):  # type: ignore[valid-type, misc]
        layer_alpha: float = param(
            1.0, "factor of task vectors in the first layer, and outside of layers", low=0, high=10
        )
        layer_beta: float = param(0.0, "what is added to layer_alpha on the way to the last layer", low=0, high=10)

        wants_depth = True

        def __post_init__(self) -> None:
            super().__post_init__()
            if not self.layer_alpha and not self.layer_beta:
                raise idle(self.name, BETA, self.layer_beta, "0 to 10 but not 0 beside layer_alpha=0")

        def workspace(self, spec: TensorSpec) -> int:
            return int(super().workspace(spec)) + 4 * spec.numel

        def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Survey:
            found: Survey = super().survey(state, *self._scaled(delta, spec, expert))
            return found

        def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
            delta, spec, expert = self._scaled(delta, spec, expert)
            state, sums = super().update(state, delta, spec, expert)
            return state, {**sums, "task_vector": energy(delta)}

        def keep(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
            kept: State = super().keep(*self._scaled(delta, spec, expert))
            return kept

        def second_pass(self, experts: int) -> Method | None:
            found: Method | None = super().second_pass(experts)
            if found is None:
                return None
            own = {f.name: getattr(found, f.name) for f in fields(found)}  # type: ignore[arg-type]
            scaled: Any = layered(type(found))
            method: Method = scaled(**own, layer_alpha=self.layer_alpha, layer_beta=self.layer_beta)
            return method

        def _scaled(
            self, delta: Tensor, spec: TensorSpec, expert: Contribution
        ) -> tuple[Tensor, TensorSpec, Contribution]:
            scale = 1.0 if spec.statistic else self.layer_alpha + self.layer_beta * (spec.depth or 0.0)
            if scale == 1:
                return delta, spec, expert
            if expert.factors:
                up_MK, down_KN = expert.factors
                expert = replace(expert, factors=(scale * up_MK, down_KN))
            return scale * delta, spec, expert

    Layered.__name__ = Layered.__qualname__ = f"Layered{cls.__name__}"
    Layered.__doc__ = cls.__doc__
    return Layered
