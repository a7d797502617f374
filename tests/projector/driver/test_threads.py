"""Figures have the same bits whatever torch's number of threads is."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from projector.driver.measure import overlap, pairs
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader
from projector.lora.config import LoraConfig
from projector.lora.expert import LoraExpert

SHAPE = (700, 1000)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def opened(tmp_path: Path, name: str, tensors: dict[str, Tensor]) -> TensorReader:
    save_file(tensors, tmp_path / name)
    return TensorReader(os.open(tmp_path / name, os.O_RDONLY))


def test_norms_cosines_and_the_lengths_of_dora_do_not_depend_on_threads(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    base, a, b = (
        Checkpoint([opened(tmp_path, name, {"w.weight": torch.randn(SHAPE, generator=draw)})]) for name in "xab"
    )
    factors = {
        "base_model.model.w.lora_A.weight": torch.randn(3, SHAPE[0], generator=draw),
        "base_model.model.w.lora_B.weight": torch.randn(SHAPE[1], 3, generator=draw),
        "base_model.model.w.lora_magnitude_vector": torch.rand(SHAPE[1], generator=draw),
    }
    found, config = [], LoraConfig(r=3, lora_alpha=3, use_dora=True, fan_in_fan_out=True)
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        expert = LoraExpert([opened(tmp_path, f"l{count}", factors)], {}, config, base)
        columns = expert.fetch(base.schema["w.weight"], slice(0, 9))[2]
        found.append((overlap(base, a, b), pairs(base, a, [b], str), columns.tolist()))
        assert torch.get_num_threads() == count
    assert found[0] == found[1] == found[2]
