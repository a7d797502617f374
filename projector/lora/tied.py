"""Which tensors of an adapter are there a second time: a tied weight, under its other name."""

from collections.abc import Mapping

import torch

from projector.lora.config import LoraConfig
from projector.lora.keys import FULL, A, B, is_embedding
from projector.source import Checkpoint


class Tied:
    """Knows the tensors that the adapter changes and the base has: the second copy of one of them may be left out."""

    def __init__(self, adapter: Checkpoint, config: LoraConfig, at_home: Mapping[str, Mapping[str, str]]) -> None:
        self._adapter = adapter
        self._config = config
        self._at_home = at_home
        self._saved = {parts[FULL] for parts in at_home.values() if FULL in parts}

    def repeats(self, target: str, parts: Mapping[str, str]) -> bool:
        """True for a whole tensor with the values of one that the base has, and for the factors of an embedding that
        the base has, turned round, as ensure_weight_tying repeats them for the output layer."""
        if FULL in parts and not self._has_again(parts[FULL]):
            return False
        if parts.keys() == {FULL}:
            return True
        return parts.keys() - {FULL} == {A, B} and any(
            {A, B} <= other.keys()
            and is_embedding(other)
            and self._scaling(target) == self._scaling(name)
            and self._turned(parts[A], other[B])
            and self._turned(parts[B], other[A])
            for name, other in self._at_home.items()
        )

    def _has_again(self, name: str) -> bool:
        """True where a whole tensor has the values of one that the base has, unless they are one value throughout, as
        those of two biases of zeros are by chance."""
        spec, twins = self._adapter.schema[name], self._adapter.twins().get(name, ())
        if len(spec.shape) > 1:
            return not self._saved.isdisjoint(twins)
        alike = (other for other in self._saved if self._adapter.schema[other].shape == spec.shape)
        values = self._adapter.read(name)
        varied = bool((values != values.flatten()[:1]).any())
        return varied and any(torch.equal(values, self._adapter.read(other)) for other in alike)

    def _scaling(self, tensor: str) -> float:
        return self._config.scaling(tensor.rpartition(".")[0])

    def _turned(self, one: str, other: str) -> bool:
        """True where one is the other transposed."""
        a, b = self._adapter.schema[one], self._adapter.schema[other]
        if a.dtype != b.dtype or len(a.shape) != 2 or a.shape != b.shape[::-1]:
            return False
        return torch.equal(self._adapter.read(one), self._adapter.read(other).T)
