"""Adapters of PEFT's other kinds are refused by name; what the hint says is done, and the whole model is merged."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from daemon.checkpoints.checkpoint import open_path
from daemon.errors import Reason, Refused
from tests.adapters import llama, transformers

pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

Q = ["q_proj", "v_proj"]


def mixtral() -> nn.Module:
    config = transformers.MixtralConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
    )
    return transformers.MixtralForCausalLM(config)


KINDS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "LOHA": (llama, peft.LoHaConfig(target_modules=Q)),
    "LOKR": (llama, peft.LoKrConfig(target_modules=Q)),
    "IA3": (llama, peft.IA3Config(target_modules=Q, feedforward_modules=[])),
    "VERA": (llama, peft.VeraConfig(target_modules=Q, r=4)),
    "OFT": (llama, peft.OFTConfig(target_modules=Q, r=0, oft_block_size=4)),
    "ADALORA": (llama, peft.AdaLoraConfig(target_modules=Q, total_step=10)),
    "target_parameters": (
        mixtral,
        peft.LoraConfig(target_modules=Q, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_first_it_is_an_expert(tmp_path: Path, kind: str) -> None:
    make, config = KINDS[kind]
    torch.manual_seed(1)
    model: Any = make()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(Refused, match=kind) as caught, open_path(tmp_path / "adapter"):
        pass
    assert caught.value.reason is Reason.ADAPTER and "model.merge_and_unload()" in caught.value.hint
    adapted.merge_and_unload().save_pretrained(tmp_path / "whole")
    with open_path(tmp_path / "base") as base, open_path(tmp_path / "whole") as whole:
        whole.check(base.tensors, {})
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "whole"))
        moved = 0
        for name in whole.tensors.order:
            spec, theta_0 = base.tensors.schema[name], base.tensors.read(name)
            delta = whole.tensors.delta(spec, theta_0, whole.tensors.fetch(spec, None))
            assert torch.equal(delta, after[name] - before[name])
            moved += bool(delta.any())
        assert moved >= len(Q)


def test_the_kinds_that_no_merge_can_take_are_those_that_peft_cannot_merge() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from daemon.checkpoints.adapter_config import NO_WEIGHTS_CHANGED

    known = {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    prompts = {
        kind.value for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items() if not hasattr(tuner, "merge_and_unload")
    }
    assert prompts <= NO_WEIGHTS_CHANGED <= known
