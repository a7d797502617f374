"""The delta of one tensor under a LoRA adapter, from its parts, in float64 block by block.

    LoRA    delta = s B A                                        (Hu et al., arXiv 2106.09685)
    DoRA    delta = (m / ||W0 + s B A||) (W0 + s B A) - W0       (Liu et al., arXiv 2402.09353)

B A lies as the weight does for linear layers and convolutions, whose A is flattened to (r, n). For embeddings, and for
layers that store their weight as (inputs, outputs), it is the weight's transpose. The norms of DoRA, and its m, are of
what makes one output: a row of W in the first case, a column in the second.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from projector.algebra.linalg import WIDE_NUMEL, row_blocks
from projector.method import Factors


@dataclass(frozen=True)
class Patch:
    """What an adapter does to one tensor of the base, by the names that the tensors have in the adapter's file.

    In this order: `full` takes the place of W0; scaling * up @ down is added, where up = B (m, r) and down = A (r, n),
    or up = A' and down = B' where `transposed`; DoRA's `magnitude` sets the lengths; scaling * `offset` is added; the
    rows `rows` become those of `tokens`. None leaves a part out.
    """

    full: str | None = None
    a: str | None = None
    b: str | None = None
    transposed: bool = False
    scaling: float = 1.0
    magnitude: str | None = None
    offset: str | None = None
    tokens: str | None = None
    rows: Sequence[int] = ()

    def named(self) -> dict[str, str]:
        """The tensors of the adapter's file that it consists of, by what they are in it."""
        parts = ("full", "a", "b", "magnitude", "offset", "tokens")
        return {part: name for part in parts if (name := getattr(self, part)) is not None}


@dataclass(frozen=True)
class Parts:
    """The parts of a patch that one block of rows needs, as they were read.

    full: (m, ...). up: (m, r). down: (r, ...). lengths: (m,), magnitudes of rows. columns: (n,), what columns are
    multiplied by. offset: (m,). at: (k,), int64, rows within the block. values: (k, n), what those become.
    """

    full: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None
    lengths: Tensor | None = None
    columns: Tensor | None = None
    offset: Tensor | None = None
    at: Tensor | None = None
    values: Tensor | None = None

    def listed(self) -> list[Tensor]:
        """What there is of it, in order."""
        fields = (self.full, self.up, self.down, self.lengths, self.columns, self.offset, self.at, self.values)
        return [field for field in fields if field is not None]

    @classmethod
    def of(cls, patch: Patch, tensors: Sequence[Tensor]) -> "Parts":
        """From the list that `listed` made for this patch."""
        rest = iter(tensors)

        def taken(there: object) -> Tensor | None:
            return next(rest) if there else None

        return cls(
            full=taken(patch.full),
            up=taken(patch.a),
            down=taken(patch.a),
            lengths=taken(patch.magnitude and not patch.transposed),
            columns=taken(patch.magnitude and patch.transposed),
            offset=taken(patch.offset),
            at=taken(patch.tokens),
            values=taken(patch.tokens),
        )


def delta_of(base: Tensor, patch: Patch, parts: Parts) -> Tensor:
    """theta - theta_0 in float32, on base's device; `base` is the whole tensor or a block of rows."""
    w_MN = _matrix(base)
    out_MN = torch.empty(w_MN.shape, dtype=torch.float32, device=base.device)
    for rows, delta_BN in _blocks(w_MN, patch, parts):
        out_MN[rows] = delta_BN
    if parts.at is not None and parts.values is not None:
        out_MN[parts.at] = (_matrix(parts.values).double() - w_MN[parts.at].double()).float()
    return out_MN.reshape(base.shape)


def factors_of(patch: Patch, parts: Parts) -> Factors | None:
    """up (m, r), of orthonormal columns, and down (r, n) in float64, where their product is all that the patch does to
    a matrix.

    Orthonormal, so that `down` is as long as the delta. In B A itself much may cancel: an adapter that was converted
    from another start is [B, -B0] [A; A0].
    """
    if parts.up is None or parts.down is None or len(parts.listed()) > 2:
        return None
    up_MR, turn_RR = torch.linalg.qr(parts.up.double())
    return up_MR, turn_RR @ parts.down.flatten(1).double() * patch.scaling


def squared_columns(base: Tensor, patch: Patch, parts: Parts) -> Tensor:
    """The squared norms of the columns of W0 + delta, (n,), float64, over the rows at hand."""
    w_MN = _matrix(base)
    total_N = torch.zeros(w_MN.shape[1], dtype=torch.float64, device=base.device)
    for rows, delta_BN in _blocks(w_MN, patch, parts):
        total_N += delta_BN.add_(w_MN[rows].double()).square_().sum(0)
    return total_N


def _blocks(w_MN: Tensor, patch: Patch, parts: Parts) -> Iterator[tuple[slice, Tensor]]:
    """(rows, delta of these rows in float64), for a matrix or a tensor seen as one; `tokens` come later."""
    down_RN = None if parts.down is None else parts.down.flatten(1).double() * patch.scaling
    for rows in row_blocks(w_MN, WIDE_NUMEL):
        if parts.up is not None and down_RN is not None:
            delta_BN = parts.up[rows].double() @ down_RN
        else:
            delta_BN = torch.zeros(w_MN[rows].shape, dtype=torch.float64, device=w_MN.device)
        if parts.full is not None:
            delta_BN += _matrix(parts.full)[rows].double() - w_MN[rows].double()
        if parts.lengths is not None or parts.columns is not None:
            w_BN = w_MN[rows].double()
            delta_BN += w_BN
            if parts.lengths is not None:
                norms_B1 = torch.linalg.vector_norm(delta_BN, dim=1, keepdim=True)
                delta_BN *= parts.lengths[rows].double().unsqueeze(1) / norms_B1
            elif parts.columns is not None:
                delta_BN *= parts.columns
            delta_BN -= w_BN
        if parts.offset is not None:
            delta_BN += patch.scaling * parts.offset[rows].double().unsqueeze(1)
        yield rows, delta_BN


def _matrix(x: Tensor) -> Tensor:
    """(m, ...) seen as (m, n); a vector as (m, 1), a scalar as (1, 1)."""
    return x.flatten(1) if x.ndim > 1 else x.reshape(-1, 1)
