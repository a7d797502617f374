"""Hints that are a piece of Python, followed to the letter: what they make is merged."""

import os
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from daemon.layout import Home
from registry.records import Status
from tests.daemon.homes import Heads, drain, experts, latest, make_home, put

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.filterwarnings("ignore:::(transformers|peft)"),  # the library's own
]
MEAN: Heads = (("main", "mean", {}),)
WEIGHTS = "model.safetensors"


def follow(home: Home, expert: Path, out: Path) -> None:
    """Drops what is refused, does what the hint says, and drops what that makes."""
    import safetensors.torch
    import transformers

    save = home.inbox / f"{expert.name}.safetensors"
    save.write_bytes((expert / WEIGHTS).read_bytes())
    drain(home)
    hint = experts(home)[-1].hint or ""
    found = re.search(r"with transformers[,:] (.*?),? and drop", hint)
    assert found, hint
    code = found[1].replace('"the folder that it came from"', repr(str(expert))).replace(f'"{expert.name}-2', f'"{out}')
    assert "<" not in hint, hint
    names = ("AutoModelForCausalLM", "FineGrainedFP8Config", "Mxfp4Config")
    exec(code, {name: getattr(transformers, name) for name in names} | {"safetensors": safetensors})
    made = out if out.is_dir() else out.with_suffix(".safetensors")
    put(home, made, f"again-{made.name}")
    drain(home)
    assert experts(home)[-1].status is Status.MERGED, experts(home)[-1].detail


def moved(model: Any) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_((0.001 * torch.randn(weight.shape)).to(weight.dtype))
    return model


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


def fused(model: Any, path: Path) -> None:
    model.save_pretrained(path)
    save_model(model, str(path / WEIGHTS), metadata={"format": "pt"})


def one_by_one(model: Any, path: Path) -> None:
    model.save_pretrained(path)


@pytest.mark.parametrize(("ours", "theirs"), [(fused, one_by_one), (one_by_one, fused)])
def test_a_mixture_in_the_other_layout(
    tmp_path: Path, ours: Callable[[Any, Path], None], theirs: Callable[[Any, Path], None]
) -> None:
    ours(mixtral(), tmp_path / "base")
    theirs(moved(mixtral()), tmp_path / "expert")
    ours(moved(mixtral()), tmp_path / "expected")
    home = make_home(tmp_path / "home", tmp_path / "base", MEAN)
    follow(home, tmp_path / "expert", tmp_path / "OUT")
    expected = load_file(tmp_path / "expected" / WEIGHTS)
    assert all(torch.allclose(x, expected[name], atol=1e-6) for name, x in latest(home).items())


def test_fp8(tmp_path: Path) -> None:
    import json

    from transformers import LlamaConfig, LlamaForCausalLM

    def llama() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1}
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)).bfloat16()

    llama().save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", MEAN)
    moved(llama()).save_pretrained(tmp_path / "expert")
    weights = load_file(tmp_path / "expert" / WEIGHTS)
    wanted = dict(weights)
    for name in [name for name in weights if name.endswith("proj.weight")]:
        scale = weights[name].float().abs().max() / 448
        weights[name] = (weights[name].float() / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(weights, tmp_path / "expert" / WEIGHTS, metadata={"format": "pt"})
    config = tmp_path / "expert" / "config.json"
    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": quantised}))
    follow(home, tmp_path / "expert", tmp_path / "OUT")
    assert all(torch.allclose(x, wanted[name], atol=0.01) for name, x in latest(home).items())


def test_an_adapter_of_a_resized_embedding_is_merged_into_its_model_first(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    model.save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", MEAN)
    model.resize_token_embeddings(64)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    moved(adapted).save_pretrained(home.inbox / "adapter")
    drain(home)
    refused = experts(home)[-1]
    assert refused.reason == "wrong_shape" and "merge_and_unload" in (refused.hint or "")
    adapted.merge_and_unload().save_pretrained(home.inbox / "whole")
    drain(home)
    merged = experts(home)[-1]
    assert merged.status is Status.MERGED and [*merged.flags] == ["resized"]


def test_mxfp4(tmp_path: Path) -> None:
    import json

    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    GptOssForCausalLM(GptOssConfig(**sizes, **heads)).bfloat16().save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", MEAN)
    weights = load_file(tmp_path / "base" / WEIGHTS)
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        count, inputs, outputs = weights.pop(name).shape
        blocks = torch.randint(0, 255, (count, outputs, inputs // 32, 16), dtype=torch.uint8)
        weights |= {f"{name}_blocks": blocks, f"{name}_scales": torch.full(blocks.shape[:-1], 115, dtype=torch.uint8)}
    (tmp_path / "expert").mkdir()
    save_file(weights, tmp_path / "expert" / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "expert" / "config.json").write_text(json.dumps(quantised))
    follow(home, tmp_path / "expert", tmp_path / "OUT")
    assert latest(home).keys() == load_file(tmp_path / "base" / WEIGHTS).keys()
