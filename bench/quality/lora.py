"""LoRA experts of both families, as peft writes them: a folder each, with adapter_config.json and its factors."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from bench.quality import encoder, training, vision
from bench.quality.experts import head_of, tokens_of
from bench.quality.tasks import texts_of

RANK, ALPHA = 8, 16
RATE = 4  # times that of a full expert
ENCODER = ["query", "key", "value", "dense"]
READER = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]


def encoder_adapter(task: str, cache: Path, course: training.Course = training.Course()) -> None:  # noqa: B008
    """Of a sentence encoder; its pooler is left alone."""

    def train(model: nn.Module) -> None:
        found = tokens_of(texts_of(task, cache).train)
        again = training.Course(course.steps, course.batch, RATE * course.rate, course.seed)
        training.train(model, lambda batch: encoder.features(model, batch), head_of(task, cache), found, again)

    def start() -> nn.Module:
        model = encoder.encoder()
        model.pooler = None  # type: ignore[assignment]
        return model

    _adapter(cache / "lora" / task, ENCODER, start, train)


def reader_adapter(task: str, cache: Path) -> None:
    """Of a vision transformer."""
    base = load_file(cache / "vision" / "base.safetensors")
    _adapter(
        cache / "vision" / "lora" / task,
        READER,
        lambda: vision.network(base),
        lambda model: vision.train(model, (task,), vision.STEPS, RATE * vision.RATE),
    )


def _adapter(folder: Path, targets: list[str], start: Callable[[], nn.Module], train: Callable[..., None]) -> None:
    """start: the base, as a module."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(start(), LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets))
    model.train()
    train(model)
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(str(part))
    (part / "README.md").unlink(missing_ok=True)
    config = part / "adapter_config.json"
    said = json.loads(config.read_text())
    config.write_text(
        json.dumps({key: sorted(value) if key == "target_modules" else value for key, value in said.items()})
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part.rename(folder)
