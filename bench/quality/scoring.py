"""What weights score in tasks: the texts tokenised once, one encoder whose weights are put in anew."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from bench.quality import encoder
from bench.quality.encoder import Tokens, Weights
from bench.quality.experts import head_of, tokens_of
from bench.quality.tasks import texts_of
from bench.quality.texts.sampling import unlabelled

TEXTS = 300  # of a task; its standard deviation is 2.5 points or less, but all methods are scored on the same ones


class Scorer:
    """Of these tasks, with this many texts each."""

    def __init__(self, cache: Path, tasks: Iterable[str], texts: int = TEXTS) -> None:
        self._cache, self._training = cache, dict[str, Tokens]()
        self.heads = {name: head_of(name, cache) for name in tasks}
        self._tokens = {name: tokens_of(texts_of(name, cache).test.first(texts)) for name in self.heads}
        self._model = encoder.encoder()

    def scores(self, weights: Weights, tasks: Iterable[str] | None = None) -> dict[str, float]:
        """By task, the share, 0..1, that is put into its class. tasks: all, or some of them."""
        encoder.put(self._model, weights)
        return {name: self.accuracy(self._model, name) for name in (self.heads if tasks is None else tasks)}

    def model(self) -> nn.Module:
        """A new encoder, in the state in which it is used."""
        return encoder.encoder().eval()

    def accuracy(self, model: nn.Module, task: str) -> float:
        """What `scores` says, of an encoder as it is."""
        return encoder.accuracy(model, self.heads[task], self._tokens[task])

    def logits(self, model: nn.Module, task: str, step: int) -> Tensor:
        """(b, classes) of one batch of the training texts."""
        if task not in self._training:
            self._training[task] = tokens_of(texts_of(task, self._cache).train)
        found = self._training[task]
        batch = found.batch(unlabelled(task, step, len(found.ids)))
        return self.heads[task].of(encoder.features(model, batch))
