"""What zipping keeps of models of different initialisation, and of experts of one base: real training on digits.

    python -m bench.zipit [WIDTH ...]

Of different initialisation: networks 64-WIDTH-WIDTH-10 with ReLU, each trained from its own beginning on some of the
ten digits of scikit-learn, the others never seen. Printed, as docs/zipit.md has it: held-out accuracy over all ten
digits, and the mean over the models of that among each one's own digits, each the mean of SEEDS trainings. The ensemble
runs all models and takes each one's word on its own digits; a partial zip does so with its heads.

Of one base: pairs of the demo's experts, each scored on both places. The calibration data is the training images of all
tasks, without labels. Half a minute a width; nothing is timed but zipping itself.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from daemon.demo import digits
from daemon.zipit.zipping import How, zipit
from projector.algebra.linalg import one_thread

WIDTHS = (64, 256)
SEEDS = 5
EPOCHS, BATCH, RATE = 30, 32, 2e-3
HALVES = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9))
FIFTHS = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9))
FORMS: dict[str, How | None] = {
    "the models' ensemble, all run": None,
    "zipped up to the first hidden layer": How(to="0"),
    "zipped up to the second": How(to="2"),
    "zipped whole": How(),
    "zipped whole, alpha 0.3, beta 0.125": How(0.3, 0.125),
    "permuted only, beta 0": How(beta=0),
    "plain average": None,
}
FILE = """
from torch import nn
from safetensors.torch import load_file

def model(folder):
    width = len(load_file(folder)["0.bias"])
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))

def batches():
    yield from load_file({data!r})["inputs"].split(100)
"""
DEMO = """
from safetensors.torch import load_file
from daemon.demo.digits import network

def model(folder):
    return network()

def batches():
    yield from load_file({data!r})["inputs"].split(100)
"""

Weights = Mapping[str, Tensor]


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


@one_thread()
def trained(width: int, seed: int, classes: Sequence[int]) -> Weights:
    """A network that has begun anywhere and seen these digits alone."""
    images, labels = split()[:2]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(width)
        own = torch.isin(labels, torch.tensor(classes))
        optimizer = torch.optim.Adam(model.parameters(), RATE)
        for _ in range(EPOCHS):
            for batch in own.nonzero()[:, 0][torch.randperm(int(own.sum()))].split(BATCH):
                loss = functional.cross_entropy(model(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images (n, 64) and labels, and the held-out ones: the demo's."""
    found = digits._digits()
    return (
        found.train_images.flatten(1),
        found.train_labels,
        found.held_out_images.flatten(1),
        found.held_out_labels,
    )


@one_thread()
def probabilities(weights: Weights) -> Tensor:
    """Of the held-out images, (n, 10)."""
    model = network(len(weights["0.bias"]))
    model.load_state_dict(dict(weights))
    with torch.inference_mode():
        return model(split()[2]).softmax(dim=1)


def own_words(parts: Sequence[Tensor], tasks: Sequence[Sequence[int]]) -> Tensor:
    """(n, 10): each model's probabilities of its own digits."""
    whole = torch.zeros_like(parts[0])
    for part, classes in zip(parts, tasks, strict=True):
        whole[:, classes] = part[:, classes]
    return whole


def scores(given: Tensor, tasks: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(accuracy over all digits, mean over tasks of that among a task's own)."""
    labels = split()[3]
    each = []
    for classes in tasks:
        of_task = torch.isin(labels, torch.tensor(classes))
        guesses = torch.tensor(classes)[given[of_task][:, classes].argmax(dim=1)]
        each.append(float((guesses == labels[of_task]).float().mean()))
    return float((given.argmax(dim=1) == labels).float().mean()), mean(each)


def compared(folder: Path, models: Sequence[Weights], tasks: Sequence[Sequence[int]]) -> dict[str, tuple[float, float]]:
    """The scores of every form of these models, by its name."""
    save_file({"inputs": split()[0].contiguous()}, folder / "data.safetensors")
    (folder / "file.py").write_text(FILE.replace("{data!r}", repr(str(folder / "data.safetensors"))))
    paths = [folder / f"{number}.safetensors" for number in range(len(models))]
    for path, model in zip(paths, models, strict=True):
        save_file(dict(model), path)
    found = {}
    for name, how in FORMS.items():
        if how is None and name == "plain average":
            given = probabilities({key: sum(one[key] for one in models) / len(models) for key in models[0]})  # type: ignore[misc]
        elif how is None:
            given = own_words([probabilities(one) for one in models], tasks)
        else:
            out = folder / name.replace(" ", "-")
            done = zipit(paths, folder / "file.py", out, how)
            heads = [load_heads(out / head) for head in done.heads] or [load_file(out / "model.safetensors")]
            parts = [probabilities(one) for one in heads]
            given = own_words(parts, tasks) if done.heads else parts[0]
        found[name] = scores(given, tasks)
    return found


def load_heads(folder: Path) -> Weights:
    return {key: one for file in sorted(folder.glob("*.safetensors")) for key, one in load_file(file).items()}


def rows(width: int, tasks: Sequence[Sequence[int]], seeds: int = SEEDS) -> dict[str, tuple[float, float]]:
    """The means over trainings."""
    found = []
    for seed in range(seeds):
        models = [trained(width, 100 * seed + number, classes) for number, classes in enumerate(tasks)]
        with TemporaryDirectory() as folder:
            found.append(compared(Path(folder), models, tasks))
    return {name: (mean(one[name][0] for one in found), mean(one[name][1] for one in found)) for name in FORMS}


def one_base() -> Iterator[tuple[str, float, float, float]]:
    """(pair, experts on their own places, plain average, zipped), for neighbours among the demo's tasks."""
    base = digits.pretrain(lambda _: None)
    experts = {task.name: digits.finetune(base, task, lambda _: None) for task in digits.TASKS[:4]}
    images = digits._digits().train_images[:600]
    for pair in pairwise(digits.TASKS[:4]):
        with TemporaryDirectory() as made:
            folder = Path(made)
            save_file({"inputs": torch.cat([task.transform(images) for task in pair])}, folder / "data.safetensors")
            (folder / "file.py").write_text(DEMO.replace("{data!r}", repr(str(folder / "data.safetensors"))))
            for task in pair:
                save_file(experts[task.name], folder / f"{task.name}.safetensors")
            zipit([folder / f"{task.name}.safetensors" for task in pair], folder / "file.py", folder / "out", How())
            zipped = load_file(folder / "out/model.safetensors")
        average = {key: (experts[pair[0].name][key] + experts[pair[1].name][key]) / 2 for key in base}
        own = mean(digits.accuracy(experts[task.name], task) for task in pair)
        scored = [mean(digits.accuracy(weights, task) for task in pair) for weights in (average, zipped)]
        yield f"{pair[0].name}, {pair[1].name}", own, *scored


def main() -> None:
    for width in map(int, sys.argv[1:]) if sys.argv[1:] else WIDTHS:
        for tasks in (HALVES, FIFTHS):
            started = time.monotonic()
            print(f"| {len(tasks)} models, width {width} | all ten digits | each one's own |\n|---|---|---|")
            for name, (joint, own) in rows(width, tasks).items():
                print(f"| {name} | {joint:.1%} | {own:.1%} |", flush=True)
            print(f"\n{time.monotonic() - started:.0f} s\n")
    print("| experts of one base | by themselves | plain average | zipped |\n|---|---|---|---|")
    for name, own, average, zipped in one_base():
        print(f"| {name} | {own:.1%} | {average:.1%} | {zipped:.1%} |", flush=True)


if __name__ == "__main__":
    main()
