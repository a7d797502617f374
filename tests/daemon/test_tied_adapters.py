"""Embeddings that an adapter brings whole, over bases that tie their output layer to it, or do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from daemon.home import Home
from registry.records import Expert, Status
from tests import adapters
from tests.adapters import gpt2, llama, peft, tied_llama, train, transformers
from tests.daemon.homes import drain, experts, make_home

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own

Model = Callable[[], nn.Module]


def bert_for_words() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.BertForMaskedLM(config)


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
    ],
)
def test_one_that_was_trained_for_itself_alone_is_refused(
    tmp_path: Path, model: Model, settings: dict[str, Any]
) -> None:
    """In the trained model the output layer is the base's: no one matrix is both."""
    _, expert = dropped(tmp_path, model, **settings)
    assert expert.reason == "adapter" and "for the embedding alone" in (expert.detail or "")
    assert "ensure_weight_tying" in (expert.hint or "")


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
        (tied_llama, {"target_modules": ["q_proj"]}),
    ],
)
def test_where_nothing_is_tied_or_the_embedding_is_left_alone_it_is_merged(
    tmp_path: Path, model: Model, settings: dict[str, Any]
) -> None:
    _, expert = dropped(tmp_path, model, **settings)
    assert expert.status is Status.MERGED, expert.detail


def test_an_embedding_that_was_saved_but_not_trained_is_no_matter(tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = tied_llama()
    base.save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter.add_(0.1 if parameter.requires_grad else 0)
    adapted.save_pretrained(str(home.inbox / "adapter"), save_embedding_layers=True)
    drain(home)
    (expert,) = experts(home)
    assert expert.status is Status.MERGED, expert.detail
