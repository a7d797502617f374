"""The demo's training is real, repeatable, and leaves something to merge. Bounds are wide: CPUs round differently."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from daemon.demo import digits
from daemon.demo.digits import CENTRE, TASKS, accuracy, finetune, network, pretrain, save_held_out
from daemon.demo.score import scores
from daemon.errors import BadConfig

Weights = dict[str, Tensor]


def silent(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def base() -> Weights:
    return pretrain(silent)


@pytest.fixture(scope="module")
def experts(base: Weights) -> list[Weights]:
    """The first two are enough to see what the other six do too."""
    return [finetune(base, task, silent) for task in TASKS[:2]]


def test_the_nine_places_tile_the_field() -> None:
    ones = torch.ones(1, digits.DIGIT, digits.DIGIT)
    covered = torch.stack([task.transform(ones) for task in (CENTRE, *TASKS)]).sum(dim=0)
    assert torch.equal(covered, torch.ones(1, digits.FIELD, digits.FIELD))
    assert len({task.name for task in (CENTRE, *TASKS)}) == 9


def test_a_place_holds_the_image_unchanged() -> None:
    image = torch.arange(64.0).reshape(1, 8, 8)
    right = next(task for task in TASKS if task.name == "right")
    assert torch.equal(right.transform(image)[:, 8:16, 16:24], image)


def test_no_image_is_both_trained_on_and_held_out() -> None:
    data = digits._digits()
    train = {tuple(row) for row in data.train_images.flatten(1).tolist()}
    held_out = {tuple(row) for row in data.held_out_images.flatten(1).tolist()}
    assert len(data.train_labels) + len(data.held_out_labels) == 1797
    assert not train & held_out


def test_the_network_maps_fields_to_ten_logits_and_has_matrices_and_vectors() -> None:
    assert network()(torch.zeros(3, digits.FIELD, digits.FIELD)).shape == (3, 10)
    assert {tensor.dim() for tensor in network().state_dict().values()} == {1, 2}


def test_the_base_reads_the_centre_and_guesses_elsewhere(base: Weights) -> None:
    assert accuracy(base, CENTRE) > 0.93
    assert all(accuracy(base, task) < 0.35 for task in TASKS)


def test_an_expert_reads_its_own_place_only(experts: list[Weights]) -> None:
    for number, expert in enumerate(experts):
        assert accuracy(expert, TASKS[number]) > 0.93
        assert accuracy(expert, TASKS[1 - number]) < 0.5


def test_half_of_each_experts_change_reads_both_places(base: Weights, experts: list[Weights]) -> None:
    merged = {name: (experts[0][name] + experts[1][name]) / 2 for name in base}
    assert all(accuracy(merged, task) > 0.8 for task in TASKS[:2])


def test_shuffled_labels_teach_nothing_and_leave_an_ordinary_norm(base: Weights, experts: list[Weights]) -> None:
    bad = finetune(base, TASKS[0], silent, shuffled=True)
    assert accuracy(bad, TASKS[0]) < 0.3

    def norm(weights: Weights) -> float:
        return float(sum((weights[name] - base[name]).double().square().sum() for name in base)) ** 0.5

    assert 0.5 < norm(bad) / norm(experts[0]) < 2


def test_the_evaluator_reads_as_the_network_does(experts: list[Weights], tmp_path: Path) -> None:
    save_file(experts[0], tmp_path / "model.safetensors")
    (tmp_path / "digits").mkdir()
    save_held_out(tmp_path / "digits" / "held-out.safetensors")
    found = scores(tmp_path, tmp_path / "digits" / "held-out.safetensors")
    assert found.keys() == {task.name for task in (CENTRE, *TASKS)}
    assert [task for task, score in found.items() if score["held_out"]] == [CENTRE.name]
    for task in (CENTRE, *TASKS):
        assert abs(found[task.name]["score"] - accuracy(experts[0], task)) <= 1 / found[task.name]["n"]


def test_training_repeats_bit_for_bit_whatever_the_threads_and_the_global_seed(
    base: Weights, experts: list[Weights]
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        torch.manual_seed(12345)
        before = torch.random.get_rng_state()
        base_again = pretrain(silent)
        expert_again = finetune(base, TASKS[1], silent)
        assert torch.get_num_threads() == threads + 1
        assert torch.equal(torch.random.get_rng_state(), before)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(base_again[name], base[name]) for name in base)
    assert all(torch.equal(expert_again[name], experts[1][name]) for name in base)


def test_fine_tuning_leaves_the_base_as_it_is_and_changes_every_tensor(base: Weights, experts: list[Weights]) -> None:
    copy = {name: tensor.clone() for name, tensor in base.items()}
    expert = finetune(base, TASKS[0], silent)
    assert all(torch.equal(copy[name], base[name]) for name in base)
    assert expert.keys() == base.keys()
    assert not any(torch.equal(expert[name], base[name]) for name in base)


def test_progress_hears_every_epoch_and_the_loss_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "EPOCHS", 2)
    lines: list[str] = []
    pretrain(lines.append)
    assert [line.rsplit(" ", 1)[0] for line in lines] == [
        "centre: epoch 1 of 2, loss",
        "centre: epoch 2 of 2, loss",
    ]
    first, last = (float(line.rsplit(" ", 1)[1]) for line in lines)
    assert last < first


def test_without_scikit_learn_the_hint_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    digits._digits.cache_clear()
    with pytest.raises(BadConfig, match="scikit-learn is not installed") as caught:
        pretrain(silent)
    assert caught.value.hint == "pip install scikit-learn"
