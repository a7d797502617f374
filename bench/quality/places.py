"""The demo's digits: a base that reads the centre of a field, and an expert for each of eight places around it.

Small and friendly, and the third family only where coefficients are learned: how much is won depends on the models.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from bench.quality.cache import make_once, save
from bench.quality.texts.sampling import unlabelled
from daemon.demo import digits

TASKS = {task.name: task for task in digits.TASKS}
Weights = Mapping[str, Tensor]


def base_of(cache: Path) -> Path:
    """Trained once."""
    path = cache / "demo" / "base.safetensors"
    make_once(path, lambda: save(digits.pretrain(lambda _: None), path))
    return path


def train_expert(task: str, cache: Path, path: Path) -> None:
    """From that base, to `path`."""
    save(digits.finetune(load_file(base_of(cache)), TASKS[task], lambda _: None), path)


class Scorer:
    """What runs them."""

    def scores(self, weights: Weights, tasks: Iterable[str]) -> dict[str, float]:
        """By task, the share, 0..1, of held-out digits that is read."""
        return {task: digits.accuracy(weights, TASKS[task]) for task in tasks}

    def model(self) -> nn.Module:
        """A new network."""
        return digits.network()

    def accuracy(self, model: nn.Module, task: str) -> float:
        """What `scores` says, of a network as it is."""
        return digits.accuracy(model.state_dict(), TASKS[task])

    def logits(self, model: nn.Module, task: str, step: int) -> Tensor:
        """(b, 10) of one batch of the training images."""
        places = unlabelled(task, step, digits.TRAINING_IMAGES)
        found: Tensor = model(TASKS[task].transform(digits._digits().train_images[places]))
        return found
