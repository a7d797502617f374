"""Experts in the cache: a folder with, by a task's name, its texts, its head, its expert, and what they score.

CACHE/
  base.safetensors
  texts/NAME.json
  heads/NAME.safetensors      weight (classes, 384), bias (classes)
  experts/NAME.safetensors    the encoder's tensors, by the base's names
  halves/ light/              other experts of the same tasks
  scores/NAME.json            {"base": 0..1, "expert": 0..1, "sha256": of the expert, ...}

Whatever is there is not made again.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from time import monotonic

from safetensors.torch import load_file

from bench.quality import encoder, training
from bench.quality.cache import make_all, make_once, note, save
from bench.quality.encoder import Head, Tokens
from bench.quality.tasks import TASKS, texts_of
from bench.quality.texts.sampling import Part

SCORED = 1000  # texts at most
LIGHT = training.Course(steps=100, rate=training.LEARNING_RATE / 4)


def tokens_of(part: Part) -> Tokens:
    """As the encoder reads them."""
    return encoder.tokens(part.texts, part.labels)


def head_of(name: str, cache: Path) -> Head:
    """Fitted once, on the training texts."""
    path = cache / "heads" / f"{name}.safetensors"

    def fit() -> None:
        found = texts_of(name, cache)
        head = training.fit_head(encoder.encoder(), tokens_of(found.train), len(found.classes))
        save({"weight": head.weight, "bias": head.bias}, path)

    make_once(path, fit)
    return Head(**load_file(path))


def train_expert(name: str, cache: Path, course: training.Course) -> None:
    """Trained and scored."""
    path = cache / "experts" / f"{name}.safetensors"
    found, head = texts_of(name, cache), head_of(name, cache)
    begun = monotonic()
    weights = training.finetuned(encoder.base(), head, tokens_of(found.train), course)
    seconds = monotonic() - begun
    save(weights, path)
    test, model = tokens_of(found.test.first(SCORED)), encoder.encoder()
    scores = {"base": encoder.accuracy(model, head, test)}
    encoder.put(model, weights)
    scores["expert"] = encoder.accuracy(model, head, test)
    said = {
        **scores,
        "classes": len(found.classes),
        "train": len(found.train.texts),
        "test": len(found.test.texts),
        "seconds": round(seconds, 1),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "course": asdict(course),
    }
    note(said, score_of(name, cache))
    print(f"{name}: base {said['base']:.3f}, expert {said['expert']:.3f}, {said['seconds']} s", flush=True)


def score_of(name: str, cache: Path) -> Path:
    """The note of what an expert scores; the expert is there when this is."""
    return cache / "scores" / f"{name}.json"


def train_half(name: str, half: int, cache: Path, course: training.Course) -> None:
    """An expert trained on every second text of a task, from the first or the second on, in half as many steps."""
    train = texts_of(name, cache).train
    part = tokens_of(Part(train.texts[half::2], train.labels[half::2]))
    shorter = replace(course, steps=course.steps // 2, seed=course.seed + half)
    save(training.finetuned(encoder.base(), head_of(name, cache), part, shorter), half_of(name, half, cache))


def train_light(name: str, cache: Path) -> None:
    """An expert trained in fewer steps, at a quarter of the rate."""
    found = tokens_of(texts_of(name, cache).train)
    save(training.finetuned(encoder.base(), head_of(name, cache), found, LIGHT), light_of(name, cache))


def light_of(name: str, cache: Path) -> Path:
    """Where that one lies."""
    return cache / "light" / f"{name}.safetensors"


def half_of(name: str, half: int, cache: Path) -> Path:
    """Where that one lies."""
    return cache / "halves" / f"{name}-{half}.safetensors"


def make_experts(cache: Path, names: Sequence[str] = tuple(TASKS), course: training.Course = training.Course()) -> None:  # noqa: B008
    """All that are missing, and the base."""
    base = cache / "base.safetensors"
    make_once(base, lambda: save(encoder.base(), base))
    make_all({score_of(name, cache): partial(train_expert, name, cache, course) for name in names})
