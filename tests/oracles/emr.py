"""EMR-Merging (arXiv 2405.17461) once more, straight from its formulas, in float64 with every expert in memory."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.oracles.rules import Weights, task_vector


def emr(base: Weights, experts: Sequence[Weights]) -> dict[str, Tensor]:
    """theta_0 + unified vector; what does not float is the base's."""
    unified = emr_unified(base, experts)
    return {name: tensor.double() + unified[name] if name in unified else tensor for name, tensor in base.items()}


def emr_views(base: Weights, experts: Sequence[Weights]) -> list[dict[str, Tensor]]:
    """theta_0 + rescale_i * mask_i * unified of each expert.

    mask_i = [tau_i * unified > 0]; rescale_i = sum |tau_i| / sum |mask_i * unified|, over the whole model.
    """
    unified = emr_unified(base, experts)
    views = []
    for expert in experts:
        task = task_vector(base, expert)
        masked = {name: unified[name] * (task[name] * unified[name] > 0) for name in unified}
        own = sum(float(tau.abs().sum()) for tau in task.values())
        agreed = sum(float(part.abs().sum()) for part in masked.values())
        rescale = own / agreed if agreed > 0 else 0.0
        views.append(
            {
                name: tensor.double() + rescale * masked[name] if name in masked else tensor
                for name, tensor in base.items()
            }
        )
    return views


def emr_unified(base: Weights, experts: Sequence[Weights]) -> dict[str, Tensor]:
    """sign(sum tau_i) * max |tau_i| over the experts whose sign it is."""
    tasks = [task_vector(base, expert) for expert in experts]
    unified = {}
    for name in tasks[0]:
        stack = torch.stack([task[name] for task in tasks])  # (experts, ...)
        sign = stack.sum(dim=0).sign()
        magnitudes = torch.where(stack.sign() == sign, stack.abs(), 0.0)
        unified[name] = sign * magnitudes.amax(dim=0)
    return unified
