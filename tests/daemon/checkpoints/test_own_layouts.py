"""Models that somebody put into a module of their own, as with PyTorch Lightning: body and head with other prefixes."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from registry.records import Status
from tests.adapters import transformers
from tests.daemon.checkpoints.test_lenient_names import folder
from tests.daemon.checkpoints.test_names import MEAN, moved
from tests.daemon.homes import assert_close, drain, experts, latest, make_home, quick
from tests.models import read_weights

os.environ["HF_HUB_OFFLINE"] = "1"
pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> Any:
    config = transformers.LlamaConfig(**SMALL, vocab_size=40, num_key_value_heads=2, tie_word_embeddings=False)
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, vocab_size=40))


def vit() -> Any:
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    )


def named(weights: Mapping[str, Tensor], body: str, **heads: str) -> dict[str, Tensor]:
    """The weights with `net.backbone.` for what the body's names begin with; and with the heads renamed."""
    renamed = {}
    for name, tensor in weights.items():
        head = name.partition(".")[0]
        inside = name.startswith(body)
        renamed[f"net.backbone.{name.removeprefix(body)}" if inside else name.replace(head, heads[head], 1)] = tensor
    return renamed


@pytest.mark.parametrize(
    ("build", "body", "head", "strange"),
    [(llama, "model.", "lm_head", "head"), (bert, "bert.", "cls", "mlm"), (vit, "vit.", "classifier", "net.head")],
)
def test_the_head_is_merged_with_the_body(
    tmp_path: Path, build: Callable[[], Any], body: str, head: str, strange: str
) -> None:
    torch.manual_seed(0)
    build().save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", MEAN)
    base = read_weights(tmp_path / "base")
    first, second, third = (moved(base, seed) for seed in (1, 2, 3))
    loose = quick(admission={"max_base_ratio": 1e9})

    folder(home.inbox / "first", named(first, body, **{head: f"net.{head}"}))
    other = named(second, body, **{head: strange})
    folder(home.inbox / "second", other)
    drain(home, loose)
    merged, refused = experts(home)
    assert merged.status is Status.MERGED and merged.flags == (), merged
    assert refused.status is Status.QUARANTINED and refused.hint and "could be" in (refused.detail or "")
    assert_close(latest(home), first)

    said = re.findall(r"that says (\{.*?\]?\})(?=;|$)", refused.hint)
    same, own = (json.loads(about) for about in said)
    folder(home.inbox / "same", other, same)
    drain(home, loose)
    folder(home.inbox / "own", named(third, body, **{head: strange}), own)
    drain(home, loose)
    assert [one.status for one in experts(home)[2:]] == [Status.MERGED] * 2, experts(home)[2:]
    kept = {name: tensor if name.startswith(body) else base[name] for name, tensor in third.items()}
    assert_close(latest(home), {name: (first[name] + second[name] + kept[name]) / 3 for name in base})


def test_a_model_of_more_layers_is_refused_for_good(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", MEAN)
    weights = moved(read_weights(tmp_path / "base"), 1)
    more = {name.replace("layers.1", "layers.2"): tensor + 1 for name, tensor in weights.items() if "layers.1" in name}
    save_file(weights | more, home.inbox / "deep.safetensors")
    drain(home)
    (refused,) = experts(home)
    assert refused.status is Status.QUARANTINED and "more layers than the base (model.layers.2)" in (refused.hint or "")
    assert "ignore" not in (refused.hint or "")
