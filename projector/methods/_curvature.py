"""What an expert brings about the curvature of its loss, checked: a diagonal Fisher, or a Gram matrix of inputs.

Also the product that regressions over inputs accumulate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from projector.algebra.linalg import EXCLUDED, is_projected
from projector.errors import BadSchema, BadValues, Reason
from projector.method import Contribution
from projector.spec import TensorSpec
from projector.text import shown

SYMMETRY = 1e-3  # of the largest diagonal element; products in TF32 keep a Gram matrix to that
RESIDUE = 1e-12  # of all that was ever added to a sum: what rounding may leave of experts that are taken out again

FISHER_HINT = "compute fisher.safetensors again: one tensor for each of the base's, of its name and shape"
GRAM_HINT = "compute gram.safetensors again: for each layer with n inputs the (n, n) matrix X'X, by the layer's name"


def regresses(spec: TensorSpec, exclude: Sequence[str] = EXCLUDED) -> bool:
    """True for a single matrix (m, n) of a torch.nn.Linear with m outputs and n inputs, both >= 2, not excluded."""
    return len(spec.shape) == 2 and is_projected(spec, exclude)


def fisher(expert: Contribution, spec: TensorSpec, delta: Tensor) -> Tensor:
    """The diagonal Fisher of this tensor, or of the rows at hand, in the shape of `delta`, float64.

    Raises BadSchema where the expert brought none or one of another shape, BadValues where a value is negative or not
    finite.
    """
    values = _brought(expert, "fisher", spec, FISHER_HINT)
    if values.shape != delta.shape:
        raise _misshapen("Fisher", spec, values, list(spec.shape), FISHER_HINT)
    values = values.double()
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise BadValues(
            Reason.BAD_SIDECAR,
            f"the Fisher of {shown(spec.name)} has values that are negative, NaN or infinite",
            "a diagonal Fisher is a mean of squared gradients: compute fisher.safetensors again",
        )
    return values


def gram(expert: Contribution, spec: TensorSpec) -> Tensor:
    """X'X of the inputs X of this layer, (n, n) in float64, for a matrix (m, n), made exactly symmetric.

    Raises BadSchema where the expert brought none or one of another shape, BadValues where it is no Gram matrix, or one
    in half precision.
    """
    hint = f'{GRAM_HINT}; or name this tensor in the method\'s "exclude", to have it averaged'
    g_NN = _brought(expert, "gram", spec, hint)
    n = spec.shape[1]
    if g_NN.shape != (n, n):
        raise _misshapen("Gram matrix", spec, g_NN, [n, n], GRAM_HINT)
    if g_NN.dtype not in (torch.float32, torch.float64):
        raise BadValues(
            Reason.BAD_SIDECAR,
            f"the Gram matrix of {shown(spec.name)} is too coarse to solve with: {g_NN.dtype}",
            "save gram.safetensors in float32 or float64",
        )
    g_NN = g_NN.double()
    diagonal_N = g_NN.diagonal()
    finite = bool(g_NN.isfinite().all())
    if not finite or bool((diagonal_N < 0).any()) or (g_NN - g_NN.T).abs().max() > SYMMETRY * diagonal_N.max():
        detail = "is not symmetric, or has a negative diagonal, NaN or infinite values"
        raise BadValues(Reason.BAD_SIDECAR, f"the Gram matrix of {shown(spec.name)} {detail}", GRAM_HINT)
    return (g_NN + g_NN.T).div_(2)


def _brought(expert: Contribution, kind: str, spec: TensorSpec, hint: str) -> Tensor:
    if kind not in expert.sidecars:
        raise BadSchema(Reason.BAD_SIDECAR, f"{kind}.safetensors has nothing for {shown(spec.name)}", hint)
    return expert.sidecars[kind]


def _misshapen(what: str, spec: TensorSpec, found: Tensor, wanted: list[int], hint: str) -> BadSchema:
    detail = f"the {what} of {shown(spec.name)} has shape {list(found.shape)} instead of {wanted}"
    return BadSchema(Reason.BAD_SIDECAR, detail, hint)
