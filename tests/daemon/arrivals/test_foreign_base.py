"""A model that does not come from this home's base, and what does: small ones, whose tensors are mostly norms' ones."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from projector.driver.head import Norms
from projector.spec import TensorSpec
from tests.adapters import bert, gpt2, llama, transformers
from tests.daemon.homes import drain, experts, make_home, quick

pytestmark = pytest.mark.filterwarnings("default")  # the library's own


def whisper() -> nn.Module:
    """Its encoder's positions are sines, saved as weights and longer than all the others."""
    config = transformers.WhisperConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=50,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


def seeded(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build()


def saved(model: nn.Module, path: Path) -> Path:
    """As save_pretrained has it: tied weights once."""
    model.save_pretrained(path)  # type: ignore[operator]
    return path


def tuned(base: Path, build: Callable[[], nn.Module], trains: Callable[[str, nn.Parameter], bool]) -> nn.Module:
    """The base after three steps of what some of its parameters learn: outputs that are all alike."""
    model = build()
    model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    model.tie_weights()  # type: ignore[operator]
    chosen = [parameter for name, parameter in model.named_parameters() if trains(name, parameter)]
    optimizer = torch.optim.AdamW(chosen, lr=1e-3)
    for _ in range(3):
        sum(parameter.sin().sum() for parameter in chosen).backward()  # type: ignore[union-attr]
        optimizer.step()
    return model


@pytest.mark.parametrize("build", [llama, whisper])
def test_another_seed_is_another_base(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    base = saved(seeded(build, 0), tmp_path / "base")
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    saved(tuned(base, build, lambda *_: True), home.inbox / "all")
    saved(tuned(base, build, lambda _, parameter: parameter.ndim == 1), home.inbox / "vectors")
    saved(seeded(build, 1), home.inbox / "other")
    drain(home)
    found = {expert.name: expert for expert in experts(home)}
    assert {name: expert.reason for name, expert in found.items()} == {
        "all": None,
        "vectors": None,
        "other": "foreign_base",
    }
    hint = found["other"].hint or ""
    assert "another base" in hint and "`mainstem init`" in hint
    limit = float(re.findall(r"put max_base_ratio = (\S+) under", hint)[0])
    (home.quarantine(found["other"].id) / "other").rename(home.inbox / "other")
    drain(home, quick(admission={"max_base_ratio": limit}))
    assert experts(home)[-1].status == "merged"


def test_a_base_of_vectors_alone(tmp_path: Path) -> None:
    base = {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8), "scale": torch.tensor(2.0)}
    save_file(base, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", [("main", "mean", {})])
    save_file({name: tensor + 0.1 for name, tensor in base.items()}, home.inbox / "one.safetensors")
    save_file({name: tensor - 3.0 for name, tensor in base.items()}, home.inbox / "two.safetensors")
    drain(home)
    assert [expert.reason for expert in experts(home)] == [None, "foreign_base"]


def norms(tensors: dict[str, Tensor]) -> Norms:
    return Norms.of((TensorSpec(n, tuple(t.shape), t.dtype), float(t.square().sum())) for n, t in tensors.items())


@pytest.mark.parametrize("build", [bert, gpt2, llama, whisper])
def test_two_seeds_are_further_apart_than_either_is_long(build: Callable[[], nn.Module]) -> None:
    base, other = (dict(seeded(build, seed).state_dict()) for seed in (0, 1))
    task_vector = norms({name: other[name] - tensor for name, tensor in base.items()})
    assert task_vector.whole < 0.5 * norms(base).whole  # the ones of their norms are most of it
    assert 1.3 < task_vector.over(norms(base)) < 1.5


@pytest.mark.parametrize(
    ("delta", "ratio"),
    [
        ({"a": 2.0}, 0.0),  # a head alone, trained however far
        ({"a": 2.0, "b": 2.0}, 1.0),
        ({"a": 0.1, "b": 0.1, "norm": 50.0, "bias": 50.0}, 0.05),
        ({"zeros": 3.0}, 0.0),  # of which nothing can be said
    ],
)
def test_over_counts_each_matrix_by_itself(delta: dict[str, float], ratio: float) -> None:
    shapes = {"a": (2, 4), "b": (2, 4), "norm": (1, 1, 64), "bias": (64,), "zeros": (8, 8)}
    base = {name: torch.full(shape, 0.0 if name == "zeros" else 2.0) for name, shape in shapes.items()}
    task_vector = {name: torch.full(shape, delta.get(name, 0.0)) for name, shape in shapes.items()}
    assert norms(task_vector).over(norms(base)) == pytest.approx(ratio)
