"""What a checkpoint holds beside trained weights, told by name and shape: derived buffers and running statistics."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

DERIVED = frozenset(
    {
        # rotary positions
        *("inv_freq", "cos_cached", "sin_cached", "cos_cache", "sin_cache", "cos_sin_cache"),
        *("freqs_cis", "freqs_cos", "freqs_sin", "periods"),
        # masks
        *("masked_bias", "causal_mask", "attn_mask", "attention_mask", "tril"),
        # positions and their tables
        *("position_ids", "token_type_ids", "relative_position_index", "relative_coords_table", "relative_buckets"),
        *("attention_bias_idxs", "alibi", "alibi_slopes"),
        # counters, marks and constants
        *("num_batches_tracked", "_float_tensor", "embed_scale", "pixel_mean", "pixel_std", "final_logits_bias"),
        # filters of audio models
        *("mel_basis", "mel_filters", "hann_window"),
        # the noise schedule of a diffusion model
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    }
)
"""The last part of a name. All are registered buffers, worked out from the configuration or fixed with the model; no
optimiser ever changes them, and libraries save them or not from one release to the next."""

ENDS = (
    "_inv_freq",
    "rope.freqs",
    "attn.mask",
    "attention.mask",
    "spectrogram.window",
    "stft.window",
    "embed_positions.weights",
)
CAUSAL_MASK = re.compile(r"(^|\.)\w*(attn|attention)\.bias$")  # of GPT-2, GPT-Neo, GPT-J, GPT-NeoX: (1, 1, n, n)

COUNTERS = frozenset({"num_batches_tracked"})
TABLES = frozenset(
    {
        *("cos_cached", "sin_cached", "cos_cache", "sin_cache", "cos_sin_cache"),
        *("freqs_cis", "freqs_cos", "freqs_sin"),
        "weights",  # of `embed_positions`
    }
)
"""Those worked out in the precision that the model is in: of far positions no digit is the same in two of them."""

FAR = 1e4  # what is further from zero in a mask is one minus infinity or another
EXACT, TINY = 1e-5, 1e-6  # relative, of float32 on whatever machine; absolute, of the smallest of float16

ROUNDED = 0.03  # what bfloat16 may make of a sum of two squares that is 1
RUNNING = ("running_", "moving_")
RUNNING_SUMS = frozenset({"cluster_size", "embed_avg", "ema_cluster_size", "ema_w"})  # of a quantiser's codebook


def is_derived(name: str, shape: Sequence[int]) -> bool:
    """True for a buffer that follows from the configuration: it is the base's, and an expert may have it or not.

    >>> is_derived("model.layers.0.self_attn.rotary_emb.inv_freq", [32]), is_derived("h.0.attn.bias", [1, 1, 16, 16])
    (True, True)
    >>> is_derived("h.0.attn.bias", [16]), is_derived("embeddings.position_embeddings.weight", [512, 16])
    (False, False)
    """
    if name.rpartition(".")[2] in DERIVED or name.endswith(ENDS):
        return True
    square = len(shape) == 4 and shape[0] == shape[1] == 1 and shape[2] == shape[3]
    return square and bool(CAUSAL_MASK.search(name))


def is_fixed(name: str) -> bool:
    """True for a derived buffer that has one value by whichever library saved it, but for rounding."""
    return name.rpartition(".")[2] not in COUNTERS | TABLES


def same_buffer(one: Tensor, other: Tensor) -> bool:
    """True for two values of a buffer, in any dtypes, that are the same but for rounding, to bfloat16 at the coarsest,
    and for which number stands for minus infinity.

    >>> frequencies = 10_000.0 ** (-torch.arange(0, 1, 1 / 64))
    >>> same_buffer(frequencies, frequencies.bfloat16().float()), same_buffer(frequencies, frequencies / 2)
    (True, False)
    """
    a, b = one.double(), other.double()
    return torch.allclose(
        a.clamp(-FAR, FAR), b.clamp(-FAR, FAR), rtol=max(_rounding(a), _rounding(b)), atol=TINY, equal_nan=True
    )


def _rounding(x: Tensor) -> float:
    """How far from what it stands for a value may be, relative to it, by how few digits these values have."""
    coarse = (dtype for dtype in (torch.bfloat16, torch.float16) if x.to(dtype).double().equal(x))
    return next((torch.finfo(dtype).eps for dtype in coarse), EXACT)


def is_sinusoidal(rows_KN: Tensor) -> bool:
    """True for rows of a table of sines and cosines, halves or turn by turn: positions that nobody trained.

    Models call it as others do what is trained ("embed_positions.weight"). A row of zeros is that of padding.

    >>> import torch
    >>> angles = torch.arange(8.0)[:, None] * torch.tensor([1.0, 0.1])
    >>> is_sinusoidal(torch.cat([angles.sin(), angles.cos()], 1)), is_sinusoidal(torch.cat([angles, angles], 1))
    (True, False)
    """
    rows_KN = rows_KN[rows_KN.any(1)]
    half = rows_KN.shape[1] // 2
    pairs = ((rows_KN[:, :half], rows_KN[:, half:]), (rows_KN[:, 0::2], rows_KN[:, 1::2]))
    return (
        len(rows_KN) > 1
        and half * 2 == rows_KN.shape[1] > 0
        and any(bool(((one.square() + other.square() - 1).abs() < ROUNDED).all()) for one, other in pairs)
    )


def is_statistic(name: str) -> bool:
    """True for what a layer counts of its inputs, as batch norm their mean and variance.

    >>> is_statistic("layer1.0.bn1.running_var"), is_statistic("layer1.0.bn1.weight")
    (True, False)
    """
    last = name.rpartition(".")[2]
    return last.startswith(RUNNING) or last in RUNNING_SUMS
