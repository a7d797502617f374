"""Embeddings that an adapter brings whole, over bases that tie their output layer to it, or do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from daemon.layout import Home
from registry.records import Expert, Status
from tests import adapters
from tests.adapters import gpt2, llama, peft, tied_llama, train, transformers
from tests.daemon.homes import drain, experts, latest, make_home
from tests.daemon.processes import rebuild

pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

Model = Callable[[], nn.Module]


def bert_for_words() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.BertForMaskedLM(config)


def two_heads() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    return transformers.GPT2DoubleHeadsModel(config)


def electra() -> nn.Module:
    """Its discriminator says of each word whether it is the right one: it has no output layer over all words."""
    config = transformers.ElectraConfig(
        vocab_size=40,
        hidden_size=16,
        embedding_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return transformers.ElectraForPreTraining(config)


def t5_encoder() -> nn.Module:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def dropped(root: Path, model: Model, **settings: Any) -> tuple[Home, Expert]:
    """A home over what save_pretrained writes, and what became of one adapter."""
    torch.manual_seed(1)
    model().save_pretrained(root / "base")
    home = make_home(root / "home", root / "base", [("main", "mean", {})])
    train(model, home.inbox / "adapter", r=2, **settings)
    drain(home)
    return home, experts(home)[0]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (tied_llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        (gpt2, {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}),
        (bert_for_words, {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}),
        (two_heads, {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}),
        (  # which peft heeds for embed_tokens and lm_head alone
            gpt2,
            {
                "target_modules": ["c_attn"],
                "modules_to_save": ["wte"],
                "fan_in_fan_out": True,
                "ensure_weight_tying": True,
            },
        ),
    ],
)
def test_one_that_was_trained_for_itself_alone_is_refused(
    tmp_path: Path, model: Model, settings: dict[str, Any]
) -> None:
    """In the trained model the output layer is the base's: no one matrix is both."""
    _, expert = dropped(tmp_path, model, **settings)
    assert expert.reason == "adapter" and "for the embedding alone" in (expert.detail or "")
    assert ("ensure_weight_tying" in (expert.hint or "")) is (model is tied_llama)


def test_one_that_was_trained_tied_answers_as_it_was_trained(tmp_path: Path) -> None:
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    home, expert = dropped(tmp_path, tied_llama, **settings)
    assert expert.status is Status.MERGED, expert.detail
    words = torch.arange(12)[None]
    load = transformers.LlamaForCausalLM.from_pretrained
    trained = peft.PeftModel.from_pretrained(load(tmp_path / "base"), str(home.archive(1) / "adapter"))
    with torch.no_grad():
        wanted, found, before = (
            model.eval()(words).logits for model in (trained, load(home.latest("main")), load(tmp_path / "base"))
        )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (before - wanted).abs().max() > 0.1


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        (llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),  # not tied
        (adapters.bert, {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}),  # nothing to tie to
        (electra, {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]}),
        (t5_encoder, {"target_modules": ["q"], "modules_to_save": ["shared"]}),
        (tied_llama, {"target_modules": ["q_proj"]}),
    ],
)
def test_where_nothing_is_tied_or_the_embedding_is_left_alone_it_is_merged(
    tmp_path: Path, model: Model, settings: dict[str, Any]
) -> None:
    _, expert = dropped(tmp_path, model, **settings)
    assert expert.status is Status.MERGED, expert.detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_embedding_that_was_saved_but_not_trained_is_no_matter(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also in the dtype that the base was loaded in: here for a model without the output layer that the base has."""
    torch.manual_seed(1)
    bert_for_words().save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", dtype=dtype)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0)
    adapted.save_pretrained(str(home.inbox / "adapter"), save_embedding_layers=True)
    names = load_file(home.inbox / "adapter" / "adapter_model.safetensors")
    assert any("word_embeddings" in name for name in names)
    drain(home)
    (expert,) = experts(home)
    assert expert.status is Status.MERGED, expert.detail


def test_a_base_that_stores_both_has_two(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = bert_for_words()
    model.save_pretrained(tmp_path / "base")
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(stored, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    train(bert_for_words, home.inbox / "adapter", r=2, target_modules=["query"], modules_to_save=["word_embeddings"])
    drain(home)
    assert experts(home)[0].status is Status.MERGED, experts(home)[0].detail


def test_one_that_was_merged_before_is_merged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a daemon that did not look for it yet."""
    monkeypatch.setattr("daemon.checkpoints.checkpoint.check_tied", lambda *_: None)
    settings = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
    home, expert = dropped(tmp_path, tied_llama, **settings)
    assert expert.status is Status.MERGED
    monkeypatch.undo()
    rebuild(home, "--into", tmp_path / "again")
    ours, theirs = latest(Home(tmp_path / "again")), latest(home)
    assert all(ours[name].equal(theirs[name]) for name in theirs)
