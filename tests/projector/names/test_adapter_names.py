"""The names that an adapter's tensors have where they were not saved by save_pretrained alone: wrapped, or as
model.state_dict() has them. The delta is what peft's own merge adds all the same."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.checkpoints.adapter_config import ADAPTER_WEIGHTS
from projector.errors import BadSchema
from projector.names.naming import Naming
from tests.adapters import configure, deltas, expert, llama, merged, rewrite, train, trained, write
from tests.projector.lora.test_lora import assert_same, model_of

pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

CARET: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj"],
    "alpha_pattern": {r"^model.layers.0.self_attn.q_proj": 32},
    "rank_pattern": {r"^model\.layers\.1\.": 9, "^model.layers.1.self_attn.v_proj": 2},
}


def renamed(folder: Path, old: str, new: str) -> None:
    rewrite(folder, lambda t: t.update({name.replace(old, new): t.pop(name) for name in list(t)}))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module.", "policy."])
@pytest.mark.parametrize("said", [True, False])
def test_patterns_go_by_what_peft_called_the_module(tmp_path: Path, wrapper: str, said: bool) -> None:
    """Whatever was put around the PeftModel later; with the settings that say so, and without."""
    base = write(llama, tmp_path)
    folder = train(llama, tmp_path / "adapter", r=4, **CARET)
    wanted = merged(llama, folder)
    renamed(folder, "base_model.model.", f"{wrapper}base_model.model.")
    naming = Naming({f"{wrapper}base_model.model.": ""}) if said else Naming()
    assert_same(deltas(base, folder, naming=naming), wanted)


def test_settings_may_speak_of_a_wrapper(tmp_path: Path) -> None:
    """As those do that an earlier refusal asked for: a base without its prefix, and a head that is left out."""
    whole = write(llama, tmp_path)
    (tmp_path / "bare").mkdir()
    bare = write(lambda: llama().model, tmp_path / "bare")  # type: ignore[arg-type,return-value]
    folder = train(llama, tmp_path / "adapter", r=4, modules_to_save=["lm_head"], **CARET)
    wanted = {name.removeprefix("model."): delta for name, delta in deltas(whole, folder).items()}
    renamed(folder, "base_model.model.", "module.base_model.model.")
    for naming in (
        Naming({"module.base_model.model.model.": ""}, ["module.base_model.model.lm_head.*"]),
        Naming({"model.": ""}, ["lm_head.*"]),
    ):
        found = deltas(bare, folder, naming=naming)
        assert found and all(torch.equal(delta, wanted[name]) for name, delta in found.items())


@pytest.mark.parametrize(
    ("old", "new", "prefixes"),
    [
        ("base_model.model.", "base_model.model.module.", {"module.": ""}),
        ("base_model.model.", "module.", {"module.": ""}),
        ("self_attn.", "_orig_mod.self_attn.", {"model.layers.*._orig_mod.": "model.layers.*."}),
        ("base_model.model.model.", "language.", {"language.": "model."}),
    ],
)
def test_where_a_pattern_could_mean_two_things_it_is_refused(
    tmp_path: Path, old: str, new: str, prefixes: dict[str, str]
) -> None:
    base = write(llama, tmp_path)
    folder = train(llama, tmp_path / "adapter", r=4, target_modules=CARET["target_modules"])
    pattern = "layers.0.self_attn.q_proj"
    configure(folder, alpha_pattern={pattern: 32})
    wanted = merged(llama, folder)
    configure(folder, alpha_pattern={f"^model.{pattern}": 32})
    renamed(folder, old, new)
    with pytest.raises(BadSchema, match=r"alpha_pattern says one thing of \S+, another of model\.layers") as caught:
        deltas(base, folder, naming=Naming(prefixes))
    assert "without ^, as the end of the name" in caught.value.hint
    configure(folder, alpha_pattern={"self_attn.q_proj": 32} if "_orig_mod" in new else {pattern: 32})
    if "_orig_mod" in new:  # the end of the name: in both layers
        restored = tmp_path / "restored"
        shutil.copytree(folder, restored)
        renamed(restored, new, old)
        wanted = merged(llama, restored)
    assert_same(deltas(base, folder, naming=Naming(prefixes)), wanted)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear and a saved head": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    "tokens, tied": ("tied_llama", {"target_modules": ["q_proj"], "trainable_token_indices": [3, 1]}),
    "dora of an embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "biases": (
        "bert",
        {
            "target_modules": ["query"],
            "bias": "all",
            "lora_bias": True,
            "modules_to_save": ["pooler", "classifier"],
        },
    ),
    "convolutions": ("convolutions", {"target_modules": ["one", "two"]}),
}


@pytest.mark.parametrize("name", ["default", "french"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whole", [True, False])
def test_an_adapter_saved_by_hand(tmp_path: Path, kind: str, name: str, whole: bool) -> None:
    """save_file(model.state_dict()), whole, or what has an adapter's name in it."""
    factory, settings = KINDS[kind]
    base = write(model_of(factory), tmp_path)
    adapted = trained(model_of(factory), name=name, r=4, **settings)
    adapted.save_pretrained(str(tmp_path))
    folder = tmp_path if name == "default" else tmp_path / name
    wanted = merged(model_of(factory), folder)
    state: dict[str, Tensor] = {n: t.clone() for n, t in adapted.state_dict().items()}
    if factory == "tied_llama":  # what save_file refuses to write twice
        state = {n: t for n, t in state.items() if "lm_head" not in n or "delta" in n}
    if not whole:
        trained_too = {n for n, p in adapted.named_parameters() if p.requires_grad}
        state = {n: t for n, t in state.items() if f".{name}" in n or n in trained_too}
        assert len(state) < len(adapted.state_dict())
    save_file(state, folder / ADAPTER_WEIGHTS)
    assert any(f".{name}" in n for n in load_file(folder / ADAPTER_WEIGHTS))
    assert_same(deltas(base, folder), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [CARET, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_an_adapter_that_is_in_the_weights_already_is_not_added_again(
    tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """A state_dict() after merge_adapter(), told from one before it by its values, also when it was rounded."""
    base = write(llama, tmp_path)
    adapted = trained(llama, r=4, **settings)
    adapted.save_pretrained(str(tmp_path))
    for merged_first in (False, True):
        if merged_first:
            adapted.merge_adapter()
        save_file({n: t.to(dtype).clone() for n, t in adapted.state_dict().items()}, tmp_path / ADAPTER_WEIGHTS)
        with expert(base, tmp_path) as (source, _):
            assert (source.merged_already() is not None) is merged_first


@pytest.mark.parametrize("end", ["weight", "weight.absmax", "weight.quant_state.bitsandbytes__nf4"])
def test_the_quantised_layers_under_an_adapter_are_to_be_left_out(tmp_path: Path, end: str) -> None:
    """A state_dict() of a QLoRA model; save_pretrained writes the adapter alone, which is merged."""
    base = write(llama, tmp_path)
    adapted = trained(llama, r=4, **CARET)
    adapted.save_pretrained(str(tmp_path))
    state = {name: tensor.clone() for name, tensor in adapted.state_dict().items() if "base_layer" not in name}
    quantised = {n.replace("lora_A.default.weight", f"base_layer.{end}") for n in state if "lora_A" in n}
    save_file(state | {name: torch.zeros(128, dtype=torch.uint8) for name in quantised}, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(BadSchema, match="base_layer") as caught:
        deltas(base, tmp_path)
    assert "save_pretrained" in caught.value.hint
    adapted.save_pretrained(str(tmp_path))
    assert_same(deltas(base, tmp_path), merged(llama, tmp_path))
