"""Writes a complete expert, with all that it can bring beside its weights, and the base that it was trained from.

    python docs/examples/sidecars.py work
    mainstem init home --base work/base --method fisher
    cp -r work/expert home/inbox/
    mainstem run --home home --once

The model is a tiny Llama made from its configuration, its data are made up. With your own, keep `write_sidecars` and
replace the rest. Needs transformers.
"""

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from projector.statistics import fisher_diagonal, input_grams, sampled_nll

Batch = Mapping[str, Tensor]


def write_sidecars(model: nn.Module, batches: Iterable[Batch], folder: Path, about: Mapping[str, object]) -> None:
    """Puts fisher.safetensors, gram.safetensors and expert.json beside the weights in `folder`.

    batches: what the model takes, on its device; gone through twice. A few hundred examples are enough.
    """
    generator = torch.Generator().manual_seed(0)

    def loss(model: nn.Module, example: Batch) -> Tensor:
        # Labels drawn from the model. For the empirical Fisher: return model(**example, labels=...).loss
        return sampled_nll(model(**example).logits, generator)

    save_file(fisher_diagonal(model, batches, loss), folder / "fisher.safetensors")
    save_file(input_grams(model, batches), folder / "gram.safetensors")
    (folder / "expert.json").write_text(json.dumps(about))


def counting(start: int, step: int) -> list[Batch]:
    """Made-up data: sequences that count in steps, in batches of four."""
    rows = [(start + n + step * torch.arange(12)) % 64 for n in range(16)]
    return [{"input_ids": torch.stack(rows[n : n + 4])} for n in range(0, 16, 4)]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )
    model.save_pretrained(folder / "base")

    batches = counting(start=3, step=5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        for batch in batches:
            optimizer.zero_grad()
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
    model.save_pretrained(folder / "expert")
    write_sidecars(
        model,
        batches,
        folder / "expert",
        {"name": "fives", "task": "counting in fives", "weight": 2, "trained_from": "main/0"},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
