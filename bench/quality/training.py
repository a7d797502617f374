"""Heads, fitted on the frozen base and then frozen; and experts: encoders trained on one task under its frozen head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.quality.encoder import Head, Tokens, Weights, all_features, encoder, features, put

LEARNING_RATE = 2e-4
STEPS, BATCH, WARMUP = 160, 32, 20
SHARPNESS = 20.0


@dataclass(frozen=True)
class Course:
    """How an expert is trained: steps of a batch, the rate rising over the first and falling to zero along a cosine."""

    steps: int = STEPS
    batch: int = BATCH
    rate: float = LEARNING_RATE
    seed: int = 0


def fit_head(model: nn.Module, found: Tokens, classes: int) -> Head:
    """The directions of the classes' mean features under the base, as zero-shot heads are directions of class names.

    Features are centred for that; the logits are SHARPNESS times a cosine with the base's own lengths.
    """
    x = all_features(model, found)
    middle = x.mean(0)
    means = torch.stack([x[found.labels == label].mean(0) for label in range(classes)]) - middle
    weight = SHARPNESS * nn.functional.normalize(means) / (x - middle).norm(dim=1).mean()
    return Head(weight, -weight @ middle)


def finetuned(
    start: Weights,
    head: Head,
    found: Tokens,
    course: Course,
    chosen: Callable[[str], bool] = lambda name: not name.startswith("pooler"),
) -> dict[str, Tensor]:
    """All weights by name, after the encoder was trained on these texts; the head is left as it is. chosen: the names
    of what is trained.
    """
    torch.manual_seed(course.seed)
    model = encoder()
    put(model, start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(chosen(name))
    model.train()
    train(model, lambda batch: features(model, batch), head, found, course)
    trained = model.state_dict()
    return {name: trained[name].clone() if name in trained else value for name, value in start.items()}


def train(model: nn.Module, forward: Callable[..., Tensor], head: Head, found: Tokens, course: Course) -> None:
    """In place."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, course.rate, weight_decay=0.0, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, course.steps))
    draw = torch.Generator().manual_seed(course.seed)
    order: list[int] = []
    for _ in range(course.steps):
        if len(order) < course.batch:
            order += torch.randperm(len(found.ids), generator=draw).tolist()
        places, order = order[: course.batch], order[course.batch :]
        loss = nn.functional.cross_entropy(head.of(forward(found.batch(places))), found.labels[places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()


def _share(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / WARMUP)
    return warm * 0.5 * float(1 + torch.cos(torch.tensor(torch.pi * step / steps)))
