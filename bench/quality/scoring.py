"""What weights score in tasks: the texts tokenised once, one encoder whose weights are put in anew."""

from collections.abc import Iterable
from pathlib import Path

from bench.quality import encoder
from bench.quality.encoder import Weights
from bench.quality.experts import head_of, tokens_of
from bench.quality.tasks import texts_of

TEXTS = 300  # of a task; its standard deviation is 2.5 points or less, but all methods are scored on the same ones


class Scorer:
    """Of these tasks, with this many texts each."""

    def __init__(self, cache: Path, tasks: Iterable[str], texts: int = TEXTS) -> None:
        self.heads = {name: head_of(name, cache) for name in tasks}
        self._tokens = {name: tokens_of(texts_of(name, cache).test.first(texts)) for name in self.heads}
        self._model = encoder.encoder()

    def scores(self, weights: Weights, tasks: Iterable[str] | None = None) -> dict[str, float]:
        """By task, the share, 0..1, that is put into its class. tasks: all, or some of them."""
        encoder.put(self._model, weights)
        return {
            name: encoder.accuracy(self._model, self.heads[name], self._tokens[name])
            for name in (self.heads if tasks is None else tasks)
        }
