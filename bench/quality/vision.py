"""A second family: a small vision transformer that reads scikit-learn's digits, in 8 places and 4 styles.

The network looks at 24 x 24 pixels, in which an 8 x 8 digit lies in one of nine places; its base has seen the centre,
in all styles. A task is a place and a style: 32 of them, so that experts of some combinations can be scored on others
that none was trained on. The head is the base's, and frozen.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.quality.texts.sampling import unlabelled

DIGIT, FIELD, PATCH = 8, 24, 4  # pixels: the side of an image, of what the network sees, of a patch
WIDTH, LAYERS, HEADS = 64, 3, 4
TRAINING_IMAGES = 1200  # of 1797; the others are held out
SCORED = 200  # of the held-out images
BATCH, STEPS, BASE_STEPS, RATE = 64, 120, 700, 1e-3
HEAD = "head"  # what begins so is frozen

PLACES = {
    name: (row * DIGIT, column * DIGIT)
    for name, row, column in (
        ("top_left", 0, 0),
        ("right", 1, 2),
        ("bottom", 2, 1),
        ("top_right", 0, 2),
        ("left", 1, 0),
        ("bottom_left", 2, 0),
        ("top", 0, 1),
        ("bottom_right", 2, 2),
    )
}
CENTRE = (DIGIT, DIGIT)
STYLES = ("plain", "mirrored", "turned", "inverted")
TASKS = tuple(f"{place}-{style}" for style in STYLES for place in PLACES)
TRAINED = tuple(
    f"{place}-{style}" for s, style in enumerate(STYLES) for p, place in enumerate(PLACES) if (s + p) % 2 == 0
)
"""Half of the combinations, every place and every style in half of its own: the other half tells what combines."""
BASE_TASKS = tuple(f"centre-{style}" for style in STYLES)

Weights = Mapping[str, Tensor]


class Network(nn.Module):
    """(n, 24, 24) to ten logits (n, 10): patches, a transformer, the mean over the patches, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn((FIELD // PATCH) ** 2, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """The logits."""
        side = FIELD // PATCH
        cut = images.reshape(-1, side, PATCH, side, PATCH).transpose(2, 3).reshape(-1, side * side, PATCH * PATCH)
        x = self.patches(cut) + self.position
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(1))


class Layer(nn.Module):
    """Attention and two linear layers, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(n, l, WIDTH) to the same."""
        n, length, _ = x.shape
        y = self.norm1(x)
        q, k, v = (p(y).reshape(n, length, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.down_proj(functional.gelu(self.up_proj(self.norm2(x))))


@cache
def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(found.images / 16, dtype=torch.float32)[order], torch.tensor(found.target)[order]


def images_of(task: str, images: Tensor) -> Tensor:
    """Digits (n, 8, 8) as that task shows them (n, 24, 24)."""
    place, style = task.split("-")
    if style == "mirrored":
        images = images.flip(2)
    elif style == "turned":
        images = images.transpose(1, 2)
    row, column = PLACES.get(place, CENTRE)
    field = images.new_zeros(len(images), FIELD, FIELD)
    field[:, row : row + DIGIT, column : column + DIGIT] = images
    return 1 - field if style == "inverted" else field


def network(weights: Weights | None = None) -> Network:
    """With these weights; untrained, always the same, without."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Network()
    if weights is not None:
        model.load_state_dict(dict(weights))
    return model


def pretrained() -> dict[str, Tensor]:
    """The base."""
    model = network()
    train(model, BASE_TASKS, BASE_STEPS, 2 * RATE)
    return weights_of(model)


def finetuned(start: Weights, task: str, *, replay: Sequence[str] = (), seed: int = 0) -> dict[str, Tensor]:
    """An expert; replay: tasks of which as many images again are mixed in."""
    model = network(start)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(HEAD))
    train(model, (task,), STEPS, RATE, seed=seed, replay=replay)
    return weights_of(model)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def train(
    model: nn.Module, tasks: Sequence[str], steps: int, rate: float, *, seed: int = 0, replay: Sequence[str] = ()
) -> None:
    """In place, what asks for gradients."""
    images, labels = (part[:TRAINING_IMAGES] for part in _digits())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        parts = [(task, BATCH // len(tasks)) for task in tasks]
        if replay:
            parts += [(replay[place], BATCH // 4) for place in torch.randint(len(replay), (4,), generator=draw)]
        shown, wanted = [], []
        for task, count in parts:
            places = torch.randint(len(labels), (count,), generator=draw)
            shown.append(images_of(task, images[places]))
            wanted.append(labels[places])
        loss = functional.cross_entropy(model(torch.cat(shown)), torch.cat(wanted))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def scores(weights: Weights, tasks: Sequence[str] = TASKS + BASE_TASKS, count: int | None = None) -> dict[str, float]:
    """By task, the share, 0..1, of held-out digits that is read."""
    model = network(weights)
    return {task: accuracy(model, task, count) for task in tasks}


def accuracy(model: nn.Module, task: str, count: int | None = None) -> float:
    """The share, 0..1, of held-out digits that a network reads."""
    images, labels = (part[TRAINING_IMAGES : TRAINING_IMAGES + (count or SCORED)] for part in _digits())
    with torch.inference_mode():
        return float((model(images_of(task, images)).argmax(1) == labels).double().mean())


class Scorer:
    """What runs them."""

    def scores(self, weights: Weights, tasks: Iterable[str]) -> dict[str, float]:
        """By task, the share, 0..1, of held-out digits that is read."""
        return scores(weights, tuple(tasks))

    def model(self) -> nn.Module:
        """A new network."""
        return network()

    def accuracy(self, model: nn.Module, task: str) -> float:
        """What `scores` says, of a network as it is."""
        return accuracy(model, task)

    def logits(self, model: nn.Module, task: str, step: int) -> Tensor:
        """(b, 10) of one batch of the training images."""
        found: Tensor = model(images_of(task, _digits()[0][unlabelled(task, step, TRAINING_IMAGES)]))
        return found
