"""A base, eight tasks and an expert for each: seconds of training on scikit-learn's handwritten digits.

The network looks at a field of 24 x 24 pixels, in which an 8 x 8 digit lies in one of nine places:

    top_left     top     top_right
    left        centre   right            the base has only ever seen digits in the centre
    bottom_left bottom   bottom_right     each expert learns one of the other eight places

The base reads the digits of the centre and guesses elsewhere. An expert reads its own place. Whether ONE network reads
all places is then up to the merge: the first layer's changes lie in different columns, but everything behind it is
shared, and the experts pull it in different directions. It is a small and friendly problem, chosen because its figures
can be checked in a minute, not a benchmark.

All figures are of images that no training has seen, though the task and the settings were chosen looking at them.
Training is seeded and runs on one thread, so it does not depend on the number of cores (another CPU model may still
round differently).
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from daemon.errors import BadConfig
from projector.algebra.linalg import one_thread

DIGIT = 8  # pixels, the side of one image
FIELD = 24  # pixels, the side of what the network sees
WIDTH = 512  # units of each hidden layer
TRAINING_IMAGES = 1200  # of 1797; the others are held out
EPOCHS = 6  # enough to read one place well; more makes the experts harder to merge
BATCH = 64
LEARNING_RATE = 2e-3  # falls to zero along a cosine
SEED = 0

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """Reading digits in one place of the field. `transform` takes images (n, 8, 8) to inputs (n, 24, 24)."""

    name: str
    description: str
    transform: Callable[[Tensor], Tensor]


def _place(images: Tensor, row: int, column: int) -> Tensor:
    """An empty field with the image's upper left corner at (row, column)."""
    field = images.new_zeros(len(images), FIELD, FIELD)
    field[:, row : row + DIGIT, column : column + DIGIT] = images
    return field


def _task(name: str, row: int, column: int) -> Task:
    place = name.replace("_", " ")
    return Task(name, f"digits at the {place} of the field", partial(_place, row=row * DIGIT, column=column * DIGIT))


CENTRE = _task("centre", 1, 1)
"""What the base was trained on: measure it too, to see what merging costs the base's own skill."""

TASKS: tuple[Task, ...] = (
    _task("top_left", 0, 0),
    _task("right", 1, 2),
    _task("bottom", 2, 1),
    _task("top_right", 0, 2),
    _task("left", 1, 0),
    _task("bottom_left", 2, 0),
    _task("top", 0, 1),
    _task("bottom_right", 2, 2),
)
"""What the experts are trained on, in the order of their arrival."""


@dataclass(frozen=True)
class _Digits:
    """Images (n, 8, 8) in 0..1 and their labels (n,), split once and for all."""

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


@lru_cache(maxsize=1)
def _digits() -> _Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BadConfig(
            "the demo trains on scikit-learn's digits, and scikit-learn is not installed",
            "pip install scikit-learn",
        ) from error
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(SEED))
    images = torch.tensor(found.images / 16, dtype=torch.float32)[order]  # grey levels are 0..16
    labels = torch.tensor(found.target, dtype=torch.int64)[order]
    n = TRAINING_IMAGES
    return _Digits(images[:n], labels[:n], images[n:], labels[n:])


def network() -> nn.Module:
    """The untrained network: (n, 24, 24) to ten logits (n, 10). The same weights on every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(
            OrderedDict(
                flatten=nn.Flatten(),
                hidden1=nn.Linear(FIELD * FIELD, WIDTH),
                norm1=nn.LayerNorm(WIDTH),
                relu1=nn.ReLU(),
                hidden2=nn.Linear(WIDTH, WIDTH),
                norm2=nn.LayerNorm(WIDTH),
                relu2=nn.ReLU(),
                head=nn.Linear(WIDTH, 10),
            )
        )


@one_thread()
def _train(model: nn.Module, task: Task, progress: Progress, *, shuffled: bool = False) -> dict[str, Tensor]:
    """Train in place on `task` and return the float32 weights. `progress` hears one line per epoch."""
    digits = _digits()
    inputs, labels = task.transform(digits.train_images), digits.train_labels
    if shuffled:
        labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    steps = len(labels) // BATCH  # per epoch; the images left over are others every time
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    shuffle = torch.Generator().manual_seed(SEED)
    for epoch in range(1, EPOCHS + 1):
        order = torch.randperm(len(labels), generator=shuffle)
        total = 0.0
        for step in range(steps):
            batch = order[step * BATCH : (step + 1) * BATCH]
            loss = functional.cross_entropy(model(inputs[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        progress(f"{task.name}: epoch {epoch} of {EPOCHS}, loss {total / steps:.4f}")
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def pretrain(progress: Progress) -> dict[str, Tensor]:
    """The base: trained from nothing on digits in the centre. Raises BadConfig without scikit-learn."""
    return _train(network(), CENTRE, progress)


def finetune(
    base: Mapping[str, Tensor], task: Task, progress: Progress, *, shuffled: bool = False
) -> dict[str, Tensor]:
    """An expert: `base` (left as it is) trained further on one task. Raises BadConfig without scikit-learn.

    shuffled: on labels that were mixed up. It learns nothing that is of use, and its task vector is as long as any.
    """
    return _train(_loaded(base), task, progress, shuffled=shuffled)


@one_thread()
def accuracy(weights: Mapping[str, Tensor], task: Task) -> float:
    """The share, 0..1, of held-out digits that `weights` reads correctly. Raises BadConfig without scikit-learn."""
    digits = _digits()
    with torch.inference_mode():
        guesses = _loaded(weights)(task.transform(digits.held_out_images)).argmax(dim=1)
    return float((guesses == digits.held_out_labels).double().mean())


def save_held_out(path: Path) -> None:
    """What daemon/demo/score.py scores by: each task's inputs (n, 24, 24), in grey levels 0..16, by its name, and the
    labels (n,). Raises BadConfig without scikit-learn.
    """
    digits = _digits()
    fields = {task.name: task.transform(digits.held_out_images) for task in (CENTRE, *TASKS)}
    levels = {name: (16 * inputs).round().to(torch.uint8) for name, inputs in fields.items()}
    save_file({**levels, "labels": digits.held_out_labels}, path)


def _loaded(weights: Mapping[str, Tensor]) -> nn.Module:
    model = network()
    model.load_state_dict(dict(weights))
    return model
