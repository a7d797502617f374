"""Experts in the cache: a folder with, by a task's name, its texts, its head, its expert, and what they score.

CACHE/
  base.safetensors
  texts/NAME.json
  heads/NAME.safetensors      weight (classes, 384), bias (classes)
  experts/NAME.safetensors    the encoder's tensors, by the base's names
  scores/NAME.json            {"base": 0..1, "expert": 0..1, "sha256": of the expert, ...}

Whatever is there is not made again.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors.torch import load_file, save_file

from bench.quality import encoder, training
from bench.quality.encoder import Head, Tokens, Weights
from bench.quality.tasks import TASKS, texts_of
from bench.quality.texts.sampling import Part

SCORED = 1000  # texts at most


def tokens_of(part: Part) -> Tokens:
    """As the encoder reads them."""
    return encoder.tokens(part.texts, part.labels)


def head_of(name: str, cache: Path) -> Head:
    """Fitted once, on the training texts."""
    path = cache / "heads" / f"{name}.safetensors"
    if not path.exists():
        found = texts_of(name, cache)
        head = training.fit_head(encoder.encoder(), tokens_of(found.train), len(found.classes))
        save({"weight": head.weight, "bias": head.bias}, path)
    return Head(**load_file(path))


def expert_of(name: str, cache: Path, course: training.Course) -> Path:
    """Trained once, and scored."""
    path, noted = cache / "experts" / f"{name}.safetensors", cache / "scores" / f"{name}.json"
    if noted.exists():
        return path
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
    note(said, noted)
    return path


def half_of(name: str, half: int, cache: Path, course: training.Course) -> Path:
    """An expert trained on every second text of a task, from the first or the second on, in half as many steps."""
    path = cache / "halves" / f"{name}-{half}.safetensors"
    if not path.exists():
        train = texts_of(name, cache).train
        part = tokens_of(Part(train.texts[half::2], train.labels[half::2]))
        shorter = replace(course, steps=course.steps // 2, seed=course.seed + half)
        save(training.finetuned(encoder.base(), head_of(name, cache), part, shorter), path)
    return path


def make_experts(cache: Path, names: Sequence[str] = tuple(TASKS), course: training.Course = training.Course()) -> None:  # noqa: B008
    """All that are missing, and the base."""
    if not (cache / "base.safetensors").exists():
        save(encoder.base(), cache / "base.safetensors")
    for name in names:
        expert_of(name, cache, course)
        said = json.loads((cache / "scores" / f"{name}.json").read_text())
        print(f"{name}: base {said['base']:.3f}, expert {said['expert']:.3f}, {said['seconds']} s", flush=True)


def save(tensors: Weights, path: Path) -> None:
    """Whole at once, so that what is there is good."""
    with _whole(path) as part:
        save_file({name: value.contiguous() for name, value in tensors.items()}, part)


def note(said: Any, path: Path) -> None:
    """JSON, in the same way: another process may read it."""
    with _whole(path) as part:
        part.write_text(json.dumps(said))


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part-{os.getpid()}")
    yield part
    part.rename(path)
