"""Kinds of checkpoints that people reported trouble with elsewhere: here each is merged as it should be, or refused
with a hint that works. The reports are named where each is made.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from daemon.home import Home
from registry.records import Expert, Status
from tests.daemon.homes import assert_close, drain, experts, latest, make_home, put
from tests.models import read_weights

Weights = dict[str, Tensor]
MEAN = (("main", "mean", {}),)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tuned(base: Mapping[str, Tensor], seed: int = 9) -> Weights:
    return {name: x + 0.01 * drawn(*x.shape, seed=seed) / 0.1 for name, x in base.items()}


def save(folder: Path, weights: Mapping[str, Tensor], **config: object) -> Path:
    folder.mkdir()
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", **config}))
    return folder


def founded(tmp_path: Path, base: Mapping[str, Tensor], **config: object) -> Home:
    return make_home(tmp_path / "home", save(tmp_path / "base", base, **config), MEAN)


def dropped(home: Home, expert: Path) -> Expert:
    put(home, expert)
    drain(home)
    return experts(home)[-1]


def normed(new: bool) -> Weights:
    """A convolution with a weight norm, as torch.nn.utils.parametrizations has it, or as torch.nn.utils had it."""
    g, v = (f"parametrizations.weight.original{n}" if new else f"weight_{'gv'[n]}" for n in (0, 1))
    found = {"encoder.layers.0.fc.weight": drawn(6, 6), "encoder.pos.conv.bias": drawn(6)}
    for layer in ("encoder.pos.conv", "decoder.blocks.3.conv", "decoder.blocks.11.conv"):
        found |= {f"{layer}.{g}": 1 + drawn(1, 1, 8), f"{layer}.{v}": drawn(6, 4, 8)}
    return found


@pytest.mark.parametrize("new", [True, False], ids=["base of today", "base of the hub"])
def test_weight_norms_by_their_other_names(new: bool, tmp_path: Path) -> None:
    """github.com/huggingface/transformers/issues/26796, pytorch/pytorch/issues/102999: wav2vec2, HuBERT, WavLM."""
    home, theirs = founded(tmp_path, normed(new)), tuned(normed(not new))
    assert dropped(home, save(tmp_path / "expert", theirs)).status is Status.MERGED
    assert_close(latest(home), dict(zip(normed(new), theirs.values(), strict=True)))


def test_files_without_metadata(tmp_path: Path) -> None:
    """github.com/ml-explore/mlx/issues/743, safetensors/safetensors/issues/549: transformers asks for a `format`."""
    home = founded(tmp_path, base := {"layer.weight": drawn(6, 6)})
    save_file(theirs := tuned(base), tmp_path / "expert.safetensors")
    assert dropped(home, tmp_path / "expert.safetensors").status is Status.MERGED
    assert_close(latest(home), theirs)
    with safe_open(home.latest("main") / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_heads_of_multi_token_prediction_that_the_library_drops(tmp_path: Path) -> None:
    """github.com/2U1/Qwen-VL-Series-Finetune/pull/259: transformers neither loads nor saves `mtp.*`."""
    base = {"model.layer.weight": drawn(6, 6), "mtp.layer.weight": drawn(6, 6, seed=1), "mtp.norm.weight": drawn(6)}
    home, theirs = founded(tmp_path, base), tuned({"model.layer.weight": base["model.layer.weight"]})
    expert = dropped(home, save(tmp_path / "expert", theirs))
    assert expert.status is Status.MERGED and expert.naming and expert.naming["unchanged"] == ["mtp.*"]
    assert_close(latest(home), {**base, **theirs})


def test_a_tied_weight_that_was_gathered_twice(tmp_path: Path) -> None:
    """github.com/EvolvingLMMs-Lab/lmms-engine/pull/157, arcee-ai/mergekit/pull/464: FSDP saves both names."""
    base = {"model.embed_tokens.weight": drawn(12, 6), "model.layer.weight": drawn(6, 6)}
    home, theirs = founded(tmp_path, base, tie_word_embeddings=True), tuned(base)
    twice = {**theirs, "lm_head.weight": theirs["model.embed_tokens.weight"].clone()}
    assert dropped(home, save(tmp_path / "expert", twice)).status is Status.MERGED
    assert_close(latest(home), theirs)


def test_a_distributed_checkpoint_is_gathered_as_the_hint_says(tmp_path: Path) -> None:
    """github.com/huggingface/accelerate/issues/2848: what FSDP saves as SHARDED_STATE_DICT."""
    home = founded(tmp_path, base := {"layer.weight": drawn(6, 6)})
    theirs, folder = tuned(base), tmp_path / "expert" / "pytorch_model_fsdp_0"
    folder.mkdir(parents=True)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"model": dict(theirs)}, checkpoint_id=folder)
    expert = dropped(home, tmp_path / "expert")
    assert expert.reason == "no_weights" and expert.hint
    command = re.search(r"accelerate merge-weights [^;]*", expert.hint)
    assert command
    program, *words = command[0].split()
    said = subprocess.run([Path(sys.executable).parent / program, *words], capture_output=True, cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert dropped(home, tmp_path / words[-1]).status is Status.MERGED
    assert_close(latest(home), theirs)


def eight_bits(base: Weights) -> Weights:
    """github.com/axolotl-ai-cloud/axolotl/pull/3771, unslothai/unsloth-zoo/pull/803: read without its scales, FP8 is
    another model. The hint is followed in test_widening.py.
    """
    return {"layer.weight": base["layer.weight"].to(torch.float8_e4m3fn), "layer.weight_scale_inv": torch.ones(1, 1)}


def four_bits(_: Weights) -> Weights:
    """github.com/unslothai/unsloth/issues/2643, huggingface/peft/issues/2501: bitsandbytes."""
    packed = {"": (128, 1), ".absmax": (4,), ".quant_state.bitsandbytes__nf4": (80,)}
    found = {f"layer.weight{end}": torch.zeros(shape, dtype=torch.uint8) for end, shape in packed.items()}
    return {**found, "layer.weight.quant_map": torch.zeros(16)}


@pytest.mark.parametrize(("quantised", "said"), [(eight_bits, "dequantize=True"), (four_bits, "before it was")])
def test_quantised_experts(quantised: Callable[[Weights], Weights], said: str, tmp_path: Path) -> None:
    home = founded(tmp_path, base := {"layer.weight": drawn(16, 16)})
    expert = dropped(home, save(tmp_path / "expert", quantised(base)))
    assert expert.reason == "unsupported_dtype" and expert.hint and said in expert.hint


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("fused", [True, False], ids=["fused base", "unfused base"])
def test_mixtures_whose_experts_are_stacked_otherwise(fused: bool, layers: int, tmp_path: Path) -> None:
    """github.com/arcee-ai/mergekit/pull/692, NVIDIA/Model-Optimizer/pull/1187: transformers 5 stacks them. Nothing of
    them is ever taken for a head and left out. The hints are followed in test_widening.py.
    """
    stacked: Weights = {}
    apart: Weights = {}
    for layer in range(layers):
        mlp = f"model.layers.{layer}.mlp"
        up, down = drawn(4, 12, 8, seed=layer), drawn(4, 8, 6, seed=layer)
        router = {f"{mlp}.gate.weight": drawn(4, 8, seed=layer)}
        stacked |= {**router, f"{mlp}.experts.gate_up_proj": up, f"{mlp}.experts.down_proj": down}
        apart |= router
        for n in range(4):
            parts = {"gate_proj": up[n, :6], "up_proj": up[n, 6:], "down_proj": down[n]}
            apart |= {f"{mlp}.experts.{n}.{part}.weight": x.clone() for part, x in parts.items()}
    base, theirs = (stacked, apart) if fused else (apart, stacked)
    expert = dropped(founded(tmp_path, base), save(tmp_path / "expert", tuned(theirs)))
    assert expert.status is Status.QUARANTINED and expert.hint and "of its mixture" in expert.hint


def test_an_index_that_names_other_shards(tmp_path: Path) -> None:
    """github.com/Blaizzy/mlx-vlm/pull/1827: shards that were written again, beside the index of before."""
    home = founded(tmp_path, base := {"a.weight": drawn(6, 6), "b.weight": drawn(6, 4)})
    theirs, folder = tuned(base), tmp_path / "expert"
    folder.mkdir()
    for n, (name, x) in enumerate(theirs.items(), start=1):
        save_file({name: x}, folder / f"model-0000{n}-of-00002.safetensors")
    old = {"a.weight": "model-00001-of-00003.safetensors", "b.weight": "model-00003-of-00003.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": old}))
    expert = dropped(home, folder)
    assert expert.reason == "incomplete" and expert.hint and "write the index again" in expert.hint and expert.place
    mended = home.root / expert.place / folder.name
    new = {name: f"model-0000{n}-of-00002.safetensors" for n, name in enumerate(theirs, start=1)}
    (mended / "model.safetensors.index.json").write_text(json.dumps({"weight_map": new}))
    assert dropped(home, mended).status is Status.MERGED
    assert_close(latest(home), theirs)


@pytest.mark.parametrize("name", ["a.gguf", "a.onnx", "tf_model.h5", "flax_model.msgpack", "a.nemo", "a.npz"])
def test_formats_that_are_not_read_are_known_by_name(name: str, tmp_path: Path) -> None:
    home = founded(tmp_path, {"layer.weight": drawn(6, 6)})
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / name).write_bytes(b"x" * 100)
    (tmp_path / f"alone-{name}").write_bytes(b"x" * 100)
    for path in (tmp_path / "expert", tmp_path / f"alone-{name}"):
        expert = dropped(home, path)
        assert expert.reason == "no_weights" and expert.detail and "holds" in expert.detail and expert.hint
        assert "save_pretrained(..., safe" not in expert.hint
    assert read_weights(home.latest("main")).keys() == {"layer.weight"}
