"""A base, its experts and what scores them: what every measurement here goes over, whichever the model."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from safetensors.torch import load_file
from torch import Tensor, nn

from bench.quality import places, vision
from bench.quality.cache import make_all, make_once, note, save
from bench.quality.experts import half_of, light_of, score_of, train_half, train_light
from bench.quality.folding import Stream
from bench.quality.lora import encoder_adapter, reader_adapter
from bench.quality.scoring import Scorer
from bench.quality.tasks import TASKS
from bench.quality.training import Course
from projector.methods import make

LEAST_GAIN = 0.03  # what an expert must win over the base in its own task, to be one
FEWER = 8  # encoders with LoRA, or that were trained less
STREAM = 16  # experts of the main stream; the tasks of the others are held out

Weights = Mapping[str, Tensor]


class Runs(Protocol):
    """What runs the models of a family, on held-out data and on batches of the training data without their labels."""

    def scores(self, weights: Weights, tasks: Iterable[str]) -> Mapping[str, float]:
        """By task, the share, 0..1, of held-out data that is put into its class."""

    def model(self) -> nn.Module:
        """A new one, whose tensors have the base's names."""

    def accuracy(self, model: nn.Module, task: str) -> float:
        """What `scores` says, of a model as it is."""

    def logits(self, model: nn.Module, task: str, step: int) -> Tensor:
        """(b, classes) of one batch of a task; of the same task and step always the same batch."""


@dataclass(frozen=True)
class Family:
    """experts: by name, in the order in which they arrive unless another is drawn; each learned the task of its name,
    or that of `tasks`. held_out: tasks that none of them learned. runs: its models.
    """

    name: str
    cache: Path
    base: Path
    experts: Mapping[str, Path]
    held_out: Sequence[str]
    runs: Runs
    tasks: Mapping[str, str]

    def task(self, expert: str) -> str:
        """What it learned."""
        return self.tasks.get(expert, expert)

    def learned(self, experts: Iterable[str]) -> list[str]:
        """What these learned."""
        return list(dict.fromkeys(self.task(one) for one in experts))

    def score(self, weights: Weights, tasks: Iterable[str]) -> Mapping[str, float]:
        """By task, the share, 0..1, that is put into its class."""
        return self.runs.scores(weights, tasks)

    def base_scores(self) -> dict[str, float]:
        """By task, of all tasks."""
        wanted = [*self.learned(self.experts), *self.held_out]
        return self._kept("base", lambda: self.score(load_file(self.base), wanted))

    def own_scores(self) -> dict[str, float]:
        """By expert, what it scores by itself in its own task; the best of a task where several learned it."""
        return {name: self._kept(f"own-{name}", partial(self._own, name))[self.task(name)] for name in self.experts}

    def _own(self, name: str) -> Mapping[str, float]:
        with Stream(make("latest"), self.base) as alone:  # an adapter's weights are whole then, too
            alone.take(self.experts[name])
            return self.score(alone.weights(), [self.task(name)])

    def _kept(self, name: str, make: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        path = self.cache / "own" / self.name / f"{name}.json"
        make_once(path, lambda: note(make(), path))
        found: dict[str, float] = json.loads(path.read_text())
        return found


def encoders(cache: Path, texts: int) -> Family:
    """Sentence encoders: the first experts that won enough, as many as a stream has. FileNotFoundError: which are not
    trained yet.
    """
    noted = {name: score_of(name, cache) for name in TASKS}
    _check_there(noted)
    said = {name: json.loads(path.read_text()) for name, path in noted.items()}
    gains = {name: one["expert"] - one["base"] for name, one in said.items()}
    chosen = [name for name, gain in gains.items() if gain >= LEAST_GAIN][:STREAM]
    held_out = [name for name in gains if name not in chosen]
    paths = {name: cache / "experts" / f"{name}.safetensors" for name in chosen}
    return Family("encoders", cache, cache / "base.safetensors", paths, held_out, Scorer(cache, texts), {})


def halves(cache: Path, texts: int, *, ready: bool = False) -> Family:
    """Twice as many encoders, two for each task. ready: FileNotFoundError where one is missing."""
    found = encoders(cache, texts)
    pairs = [(name, half) for half in (0, 1) for name in found.experts]
    wanted = {f"{name}-{half}": half_of(name, half, cache) for name, half in pairs}
    if ready:
        _check_there(wanted)
    make_all({half_of(name, half, cache): partial(train_half, name, half, cache, Course()) for name, half in pairs})
    return replace(found, name="halves", experts=wanted, tasks={f"{name}-{half}": name for name, half in pairs})


def light(cache: Path, texts: int, *, ready: bool = False) -> Family:
    """Sentence encoders that were trained less. ready: FileNotFoundError where one is missing."""
    found = encoders(cache, texts)
    paths = {task: light_of(task, cache) for task in list(found.experts)[:FEWER]}
    if ready:
        _check_there(paths)
    make_all({path: partial(train_light, task, cache) for task, path in paths.items()})
    return replace(found, name="light", experts=paths)


def encoder_adapters(cache: Path, texts: int, *, ready: bool = False) -> Family:
    """LoRA experts of the sentence encoders."""
    found = encoders(cache, texts)
    tasks = list(found.experts)[:FEWER]
    folder = cache / "lora"
    if ready:
        _check_there({task: folder / task for task in tasks})
    make_all({folder / task: partial(encoder_adapter, task, cache) for task in tasks})
    paths = {f"{task}-lora": folder / task for task in tasks}
    return replace(found, name="encoder_adapters", experts=paths, tasks={f"{task}-lora": task for task in tasks})


def readers(cache: Path, tasks: Sequence[str] = vision.TRAINED, *, ready: bool = False) -> Family:
    """Vision transformers that read digits; what is missing is trained, or with `ready` raises FileNotFoundError.

    held_out: the combinations not among them.
    """
    folder = cache / "vision"
    base = folder / "base.safetensors"
    if not ready:
        make_once(base, lambda: save(vision.pretrained(), base))
    paths = {task: folder / f"{task}.safetensors" for task in tasks}
    if ready:
        _check_there(paths)
    make_all({path: partial(_train_reader, base, task, path) for task, path in paths.items()})
    held_out = [task for task in vision.TASKS + vision.BASE_TASKS if task not in paths]
    return Family("readers", cache, base, paths, held_out, vision.Scorer(), {})


def adapters(cache: Path, tasks: Sequence[str] = vision.TRAINED[::2], *, ready: bool = False) -> Family:
    """LoRA experts of the digit readers."""
    found = readers(cache, ready=ready)
    folder = cache / "vision" / "lora"
    if ready:
        _check_there({task: folder / task for task in tasks})
    make_all({folder / task: partial(reader_adapter, task, cache) for task in tasks})
    paths = {f"{task}-lora": folder / task for task in tasks}
    return replace(found, name="adapters", experts=paths, tasks={f"{task}-lora": task for task in tasks})


def demo(cache: Path, *, ready: bool = False) -> Family:
    """The demo's network and experts, in the same way."""
    paths = {task: cache / "demo" / f"{task}.safetensors" for task in places.TASKS}
    if ready:
        _check_there(paths)
    make_all({path: partial(places.train_expert, task, cache, path) for task, path in paths.items()})
    return Family("demo", cache, places.base_of(cache), paths, [], places.Scorer(), {})


def _train_reader(base: Path, task: str, path: Path) -> None:
    save(vision.finetuned(load_file(base), task), path)


def _check_there(paths: Mapping[str, Path]) -> None:
    """Raises FileNotFoundError, naming what was not trained yet."""
    if gone := [name for name, path in paths.items() if not path.exists()]:
        raise FileNotFoundError(f"not trained yet: {', '.join(gone)}")
