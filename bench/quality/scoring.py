"""What weights score in tasks: the texts tokenised once, when first asked for, one encoder whose weights are put in."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from bench.quality import encoder
from bench.quality.encoder import Head, Tokens, Weights
from bench.quality.experts import head_of, tokens_of
from bench.quality.tasks import texts_of
from bench.quality.texts.sampling import unlabelled

TEXTS = 300  # of a task; its standard deviation is 2.5 points or less, but all methods are scored on the same ones


class Scorer:
    """With this many texts of each task."""

    def __init__(self, cache: Path, texts: int = TEXTS) -> None:
        self._cache, self._texts = cache, texts
        self._heads, self._test, self._training = dict[str, Head](), dict[str, Tokens](), dict[str, Tokens]()

    @cached_property
    def _model(self) -> nn.Module:
        return encoder.encoder()

    def scores(self, weights: Weights, tasks: Iterable[str]) -> dict[str, float]:
        """By task, the share, 0..1, that is put into its class."""
        encoder.put(self._model, weights)
        return {name: self.accuracy(self._model, name) for name in tasks}

    def model(self) -> nn.Module:
        """A new encoder, in the state in which it is used."""
        return encoder.encoder().eval()

    def accuracy(self, model: nn.Module, task: str) -> float:
        """What `scores` says, of an encoder as it is."""
        if task not in self._test:
            self._test[task] = tokens_of(texts_of(task, self._cache).test.first(self._texts))
        return encoder.accuracy(model, self._head(task), self._test[task])

    def logits(self, model: nn.Module, task: str, step: int) -> Tensor:
        """(b, classes) of one batch of the training texts."""
        if task not in self._training:
            self._training[task] = tokens_of(texts_of(task, self._cache).train)
        found = self._training[task]
        batch = found.batch(unlabelled(task, step, len(found.ids)))
        return self._head(task).of(encoder.features(model, batch))

    def _head(self, task: str) -> Head:
        if task not in self._heads:
            self._heads[task] = head_of(task, self._cache)
        return self._heads[task]
