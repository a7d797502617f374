"""Derived buffers that are not the base's are told, and none that only a library wrote otherwise."""

import pytest
import torch
from torch import Tensor

from projector.lora.config import LoraConfig
from projector.lora.expert import LoraExpert
from projector.matching import matched
from projector.naming import SAME
from tests.projector.conftest import Opens

Tensors = dict[str, Tensor]

FREQUENCIES = 1e6 ** -(torch.arange(0, 128, 2) / 128)
ANGLES = torch.arange(4096.0)[:, None] * FREQUENCIES
MASK = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)
WEIGHTS = {"wte.weight": torch.eye(4)}

BASE: Tensors = {
    "a.inv_freq": FREQUENCIES,
    "a.cos_cached": ANGLES.cos(),
    "a.betas": torch.linspace(1e-4, 0.02, 9),
    "a.attn_mask": MASK,
    "a.masked_bias": torch.tensor(-1e9),
    "a.attn.bias": torch.ones(1, 1, 600, 600).tril(),  # more than a block
    "a.embed_scale": torch.tensor(22.6274),
    "a.position_ids": torch.arange(8),
    "a.num_batches_tracked": torch.tensor(7),
    "a.final_logits_bias": torch.zeros(1, 24),
    "a.empty.tril": torch.ones(0, 4),
}


def altered(opens: Opens, name: str, value: Tensor) -> bool:
    expert = matched(opens(WEIGHTS | BASE), opens(WEIGHTS | {name: value.contiguous()}), SAME)
    assert expert.altered in ([], [name])
    return bool(expert.altered)


def changed(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[-1] += 0.5
    return x


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a.inv_freq", FREQUENCIES / 2),
        ("a.inv_freq", (FREQUENCIES / 2).bfloat16()),
        ("a.inv_freq", 5e5 ** -(torch.arange(0, 128, 2) / 128)),
        ("a.inv_freq", FREQUENCIES * (1 + 1e-4 * torch.rand(64))),
        ("a.betas", BASE["a.betas"] + 1e-3),
        ("a.attn_mask", MASK + 1),
        ("a.attn.bias", changed(BASE["a.attn.bias"])),
        ("a.embed_scale", torch.tensor(22.65)),
        ("a.position_ids", torch.arange(8.0) + 1),
        ("a.final_logits_bias", torch.full((1, 24), 0.01)),
        ("a.final_logits_bias", torch.full((1, 24), torch.nan)),
    ],
)
def test_what_was_trained_or_rescaled_is_told(opens: Opens, name: str, value: Tensor) -> None:
    assert altered(opens, name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, x.clone()) for name, x in BASE.items()),
        *(("a.inv_freq", FREQUENCIES.to(dtype)) for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        *(("a.inv_freq", FREQUENCIES.to(dtype).float()) for dtype in (torch.bfloat16, torch.float16)),
        ("a.inv_freq", FREQUENCIES * (1 + 1e-6)),
        ("a.inv_freq", FREQUENCIES[:32]),
        ("a.cos_cached", (torch.arange(4096.0)[:, None] * FREQUENCIES.bfloat16()).cos()),
        ("a.attn_mask", MASK.nan_to_num(neginf=torch.finfo(torch.float32).min)),
        ("a.masked_bias", torch.tensor(-1e4)),
        ("a.masked_bias", torch.tensor(-torch.inf, dtype=torch.float16)),
        ("a.attn.bias", BASE["a.attn.bias"].bool()),
        ("a.position_ids", torch.arange(8.0)),
        ("a.position_ids", torch.arange(8) + 2),
        ("a.num_batches_tracked", torch.tensor(9.0)),
    ],
)
def test_what_a_library_writes_otherwise_is_not(opens: Opens, name: str, value: Tensor) -> None:
    assert not altered(opens, name, value)


def test_neither_is_one_that_only_one_of_them_has(opens: Opens) -> None:
    assert not matched(opens(WEIGHTS | BASE), opens(WEIGHTS), SAME).altered
    assert not matched(opens(WEIGHTS), opens(WEIGHTS | BASE), SAME).altered


def test_one_beside_an_adapter_is_told_too(opens: Opens) -> None:
    """As PEFT saves a whole module, its buffers with it."""
    base = opens(WEIGHTS | BASE)
    factors = {f"base_model.model.wte.lora_{side}.weight": torch.ones(shape) for side, shape in FACTORS.items()}
    whole = {"base_model.model.a.betas": BASE["a.betas"] + 1e-3, "base_model.model.a.inv_freq": FREQUENCIES.half()}
    file = opens(factors | whole)._places[next(iter(factors))].file
    assert LoraExpert([file], {}, LoraConfig(r=1, lora_alpha=1), base).altered == ["a.betas"]


FACTORS = {"A": (1, 4), "B": (4, 1)}
