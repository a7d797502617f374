"""Which tensors a method takes as matrices, and how a stack of them is gone through one by one."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from projector.spec import TensorSpec

EXCLUDED = ("*embed*", "*wte*", "*wpe*", "shared.weight", "*relative_attention_bias*")


def is_projected(spec: TensorSpec, exclude: Sequence[str] = EXCLUDED) -> bool:
    """True for a matrix (m, n) with both sides >= 2, or a stack of them (k, m, n), whose name matches no glob."""
    return (
        len(spec.shape) in (2, 3)
        and spec.numel > 0
        and min(spec.shape[-2:]) >= 2
        and not any(fnmatchcase(spec.name, glob) for glob in exclude)
    )


def matrices(*operands: Tensor) -> Iterator[Sequence[Tensor]]:
    """The operands' parts, matrix by matrix, where the first operand is one matrix or a stack of them (k, m, n)."""
    if operands[0].ndim == 2:
        return iter([operands])
    return zip(*operands, strict=True)
