"""SMILE once more, from its text (Tang et al., arXiv 2408.10174, and the authors' SmileMoELinear in FusionBench).

In float64, with every expert in memory and whole singular value decompositions; nothing of the package is imported. A
model of transformers is given the rule by hooks on its linear layers.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tests.oracles.rules import DEFAULT_EXCLUDE, Weights, task_vector


def cut(tau_MN: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank."""
    u, s, vh = torch.linalg.svd(tau_MN.double(), full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def is_layers(name: str, tensor: Tensor, exclude: Sequence[str] = DEFAULT_EXCLUDE) -> bool:
    """Whether a tensor may be a layer's matrix."""
    return tensor.ndim == 2 and min(tensor.shape) >= 2 and not any(fnmatchcase(name, glob) for glob in exclude)


def smile(base: Weights, experts: Sequence[Weights], rank: int = 32) -> dict[str, Tensor]:
    """The merged task vector without a router: the mean of the experts', each matrix cut to that rank."""
    found = {}
    for name, theta0 in base.items():
        taus = [task_vector(base, expert)[name].double() for expert in experts]
        found[name] = sum(cut(tau, rank) if is_layers(name, theta0) else tau for tau in taus) / len(experts)
    return found


def routed(
    x_BN: Tensor, taus: Sequence[Tensor], moved: Sequence[Tensor] | None, rank: int, gate_rank: int, top_k: int
) -> Tensor:
    """What a router adds to a linear layer: taus (m, n) and moved (m) are its experts less the base."""
    logits = []
    for tau_MN in taus:
        v_NN = torch.linalg.svd(tau_MN, full_matrices=False)[2].T
        logits.append((x_BN @ v_NN[:, :gate_rank]).square().sum(1).sqrt())
    shares_BE = torch.softmax(torch.stack(logits, 1), 1)
    least_B1 = shares_BE.sort(1, descending=True).values[:, min(top_k, len(taus)) - 1, None]
    shares_BE = torch.where(shares_BE >= least_B1, shares_BE, 0.0)
    shares_BE = shares_BE / shares_BE.sum(1, keepdim=True)
    said = [x_BN @ cut(tau, rank).T + (0.0 if moved is None else moved[i]) for i, tau in enumerate(taus)]
    return sum(shares_BE[:, i, None] * one for i, one in enumerate(said))  # type: ignore[return-value]


def route_all(
    model: nn.Module, taus: Sequence[Weights], params: Mapping[str, int], beneath: Weights, prefix: str = ""
) -> None:
    """Gives every linear layer of a float64 model the rule, and the weights beneath their router.

    taus: the task vectors of the experts to choose among, by the names of their file. prefix: what the model's own
    names have more than those.
    """
    for name, module in model.named_modules():
        kind, own = type(module).__name__, name.removeprefix(prefix)
        weight = f"{own}.weight"
        if kind not in ("Linear", "Conv1D") or weight not in beneath or not is_layers(weight, beneath[weight]):
            continue
        turn = Tensor.t if kind == "Conv1D" else Tensor.clone
        matrices = [turn(tau[weight].double()) for tau in taus]
        moved = [tau[f"{own}.bias"].double() for tau in taus] if f"{own}.bias" in beneath else None
        module.weight.data = beneath[weight].double()  # type: ignore[assignment, union-attr]
        if moved is not None:
            module.bias.data = beneath[f"{own}.bias"].double()  # type: ignore[assignment, union-attr]

        def hook(_: Any, given: Any, out: Tensor, matrices: Any = matrices, moved: Any = moved) -> Tensor:
            flat = given[0].reshape(-1, given[0].shape[-1])
            return out + routed(flat, matrices, moved, **params).reshape(out.shape)

        module.register_forward_hook(hook)
