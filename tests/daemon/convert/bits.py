"""Whether tensors are the same, bit for bit: a NaN is itself."""

import torch
from torch import Tensor


def same_bits(one: Tensor, other: Tensor) -> bool:
    def raw(tensor: Tensor) -> bytes:
        return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())

    return (one.dtype, one.shape, raw(one)) == (other.dtype, other.shape, raw(other))


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(same_bits(found[name], expected[name]) for name in expected)
