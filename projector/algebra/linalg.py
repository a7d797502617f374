"""What the linear algebra of the methods is made of: which tensors are matrices, blocks of rows, norms, Gram matrices.

Norms and Gram matrices are float64; large operands keep their dtype and are widened block by block.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from projector.method import Factors
from projector.spec import TensorSpec

EXCLUDED = ("*embed*", "*wte*", "*wpe*", "shared.weight", "*relative_attention_bias*")

BLOCK_NUMEL = 1 << 19  # elements of a block of rows
WIDE_NUMEL = 1 << 18  # of one that is widened: 2 MiB as float64, which a core's cache holds
ENERGY_NUMEL = 1 << 16  # elements widened at a time for a norm: they stay in the cache
PIECE_NUMEL = 1 << 18  # of a flattened tensor that goes through many elementwise steps
CUDA_NUMEL = 1 << 24  # in each case on a device, which wants few large pieces: 128 MiB as float64
WIDE_BLOCKS = 6  # of rows that are there at a time, at the most
STRIPS = 4  # of a Gram matrix's columns: products of 5/8 of it give it whole


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


def energy(x: Tensor) -> float:
    """The squared Frobenius norm of `x` in float64: NaN or infinite exactly where some element is."""
    flat = x.reshape(-1)
    parts = list(pieces(x, ENERGY_NUMEL))
    wide = torch.empty_like(flat[parts[0]] if parts else flat, dtype=torch.float64)  # reused: fresh memory costs more
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part in parts:
        same = wide[: part.stop - part.start].copy_(flat[part])
        total += torch.dot(same, same)
    return float(total)


def widened(x: Tensor) -> Tensor:
    """In float32 at least: arithmetic in mixed dtypes is several times slower."""
    return x if x.dtype == torch.float64 else x.float()


def pieces(x: Tensor, numel: int = PIECE_NUMEL) -> Iterator[slice]:
    """Slices of the flattened tensor, so small that what is made of one stays in the cache; CUDA_NUMEL on a device."""
    numel = CUDA_NUMEL if x.is_cuda else numel
    return (slice(start, min(start + numel, x.numel())) for start in range(0, x.numel(), numel))


def row_blocks(x: Tensor, numel: int = BLOCK_NUMEL) -> Iterator[slice]:
    """Slices of rows of a matrix that hold about `numel` elements each, CUDA_NUMEL on a device."""
    rows = max(1, (CUDA_NUMEL if x.is_cuda else numel) // max(1, x.shape[1]))
    return (slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows))


def on_device(numel: int, nbytes: int) -> int:
    """What work on a matrix of `numel` elements takes on a device, in bytes, where it takes `nbytes` on the CPU."""
    return nbytes + 8 * WIDE_BLOCKS * min(numel, CUDA_NUMEL)


def add_product(
    h_MN: Tensor, tau_MN: Tensor, g_NN: Tensor, weight: float = 1.0, factors: Factors | None = None
) -> Tensor:
    """Adds weight * tau G to H in place, float64; tau is widened block by block, or taken as its factors."""
    if factors:
        up_MK, down_KN = factors
        return h_MN.addmm_(up_MK, down_KN @ g_NN, alpha=weight)
    for rows in row_blocks(tau_MN):
        h_MN[rows].addmm_(tau_MN[rows].double(), g_NN, alpha=weight)
    return h_MN


def gram(d_MN: Tensor, factors: Factors | None = None) -> Tensor:
    """D'D in float64, (n, n), for (m, n); from its factors, where D has them."""
    if factors:
        up_MK, down_KN = factors
        return mirrored(down_KN.T @ (up_MK.T @ up_MK @ down_KN))
    return mirrored(lower_gram(d_MN))


def lower_gram(d_MN: Tensor, sign: float = 1.0) -> Tensor:
    """The lower triangle of sign * D'D in float64, which is all that an eigensolver reads."""
    total_NN = torch.zeros(d_MN.shape[1], d_MN.shape[1], dtype=torch.float64, device=d_MN.device)
    for _, d_BN in wide_blocks(d_MN):
        add_gram(total_NN, d_BN, sign)
    return total_NN


def wide_blocks(x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows in float64, each in the place of the one before: fresh memory costs more than the widening."""
    buffer = wide_buffer(x)
    for rows in row_blocks(x, WIDE_NUMEL):
        yield rows, buffer[: rows.stop - rows.start].copy_(x[rows])


def wide_buffer(x: Tensor) -> Tensor:
    """Room for the largest of these blocks; a matrix without rows has none."""
    rows = max((rows.stop - rows.start for rows in row_blocks(x, WIDE_NUMEL)), default=0)
    return torch.empty(rows, x.shape[1], dtype=torch.float64, device=x.device)


def add_gram(total_NN: Tensor, d_BN: Tensor, sign: float) -> None:
    """Adds sign * D'D to the lower triangle of `total`, strip by strip; what is above it is left unsaid."""
    n = len(total_NN)
    width = max(1, -(-n // STRIPS))
    for start in range(0, n, width):
        strip = slice(start, start + width)
        total_NN[start:, strip].addmm_(d_BN[:, start:].T, d_BN[:, strip], alpha=sign)


def eigenvectors(lower_NN: Tensor) -> Tensor:
    """Those of a symmetric matrix, of which the lower triangle is read; their eigenvalues ascend.

    Raises LinAlgError where the solver gives up, and where it gives what is not finite, as cuSOLVER may without a word.
    """
    found_NN: Tensor = torch.linalg.eigh(lower_NN).eigenvectors
    if not found_NN.sum().isfinite():
        raise torch.linalg.LinAlgError("the eigensolver gave vectors that are not finite")  # type: ignore[attr-defined]
    return found_NN


def mirrored(lower_NN: Tensor) -> Tensor:
    return lower_NN.tril_().add_(lower_NN.tril(-1).T)


@contextmanager
def one_thread() -> Iterator[None]:
    """Single-threaded linear algebra in this thread, as a pipeline's workers have it: how a sum is split among threads
    changes its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
