"""Which tensors of an adapter are there a second time: a tied weight, under its other name."""

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from projector.files.source import Checkpoint
from projector.lora.config import LoraConfig
from projector.lora.keys import FULL, TOKENS, A, B, is_embedding

Values = tuple[torch.dtype, tuple[int, ...], bytes]


class Tied:
    """Knows the tensors that the adapter changes and the base has: the second copy of one of them may be left out.

    Each of those is read at most once, however many others are held against them.
    """

    def __init__(self, adapter: Checkpoint, config: LoraConfig, at_home: Mapping[str, Mapping[str, str]]) -> None:
        self._adapter = adapter
        self._config = config
        self._at_home = at_home
        self._saved = {parts[FULL] for parts in at_home.values() if FULL in parts}

    def repeats(self, target: str, parts: Mapping[str, str]) -> bool:
        """True for a whole tensor with the values of one that the base has, for the tokens of one, and for the factors
        of an embedding that the base has, turned round, as ensure_weight_tying repeats them for the output layer."""
        if FULL in parts and not self._has_again(parts[FULL]):
            return False
        if parts.keys() == {FULL}:
            return True
        if parts.keys() - {FULL} == {TOKENS}:
            return _values(self._adapter.read(parts[TOKENS])) in self._tokens
        if parts.keys() - {FULL} != {A, B}:
            return False
        a, b = (self._adapter.read(parts[part]) for part in (A, B))
        return (self._scaling(target), _values(b), _values(a)) in self._embeddings

    def _has_again(self, name: str) -> bool:
        """True where a whole tensor has the values of one that the base has, unless they are one value throughout, as
        those of two biases of zeros are by chance."""
        if len(self._adapter.schema[name].shape) > 1:
            return not self._saved.isdisjoint(self._adapter.twins().get(name, ()))
        values = self._adapter.read(name)
        varied = bool((values != values.flatten()[:1]).any())
        return varied and _values(values) in self._vectors

    @cached_property
    def _vectors(self) -> set[Values]:
        """What the saved tensors that are no matrices hold."""
        schema = self._adapter.schema
        return {_values(self._adapter.read(name)) for name in self._saved if len(schema[name].shape) < 2}

    @cached_property
    def _tokens(self) -> set[Values]:
        """The rows that an embedding gets."""
        return {_values(self._adapter.read(parts[TOKENS])) for parts in self._at_home.values() if TOKENS in parts}

    @cached_property
    def _embeddings(self) -> set[tuple[float, Values, Values]]:
        """(scaling, A turned round, B turned round) of every embedding's factors."""
        return set(self._turned())

    def _turned(self) -> Iterator[tuple[float, Values, Values]]:
        for name, parts in self._at_home.items():
            if {A, B} <= parts.keys() and is_embedding(parts):
                a, b = (self._adapter.read(parts[part]) for part in (A, B))
                if a.ndim == b.ndim == 2:
                    yield self._scaling(name), _values(a.T), _values(b.T)

    def _scaling(self, tensor: str) -> float:
        return self._config.scaling(tensor.rpartition(".")[0])


def _values(x: Tensor) -> Values:
    """The same for tensors of the same bytes, shape and dtype."""
    data = x.contiguous().reshape(-1).view(torch.uint8).numpy()
    return x.dtype, tuple(x.shape), hashlib.sha256(data).digest()  # type: ignore[arg-type]
