"""What the tensors of a PEFT adapter are called: which tensor of the model each changes, and which part it is."""

import re
from collections.abc import Collection, Mapping

from projector.errors import BadSchema, Reason
from projector.text import shown

PREFIX = "base_model.model."
FULL = "full"  # a whole tensor of the model: modules_to_save, a trained bias, a saved embedding
A, B, OFFSET, MAGNITUDE, TOKENS = "A", "B", "offset", "magnitude", "tokens"
PARTS = {
    "lora_A.weight": A,
    "lora_B.weight": B,
    "lora_B.bias": OFFSET,
    "lora_embedding_A": A,
    "lora_embedding_B": B,
    "lora_magnitude_vector": MAGNITUDE,
    "lora_magnitude_vector.weight": MAGNITUDE,
    "token_adapter.trainable_tokens_delta": TOKENS,
}
"""The end of a tensor's name -> its part."""

ORIGINAL, SAVED = ".original_module.", ".modules_to_save."
FOREIGN = re.compile(r"(^|\.)(lora_\w+|token_adapter|modules_to_save|original_module|base_layer)(\.|$)")


def tensor_parts(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Of each tensor of the model that an adapter changes its parts, and for each of them its name in the adapter.

    Left out is what PEFT saves beside a module of modules_to_save where all biases are trained, and does not read: the
    original module, and the trained one a second time. Raises BadSchema at a name that is none of PEFT's for LoRA.

    >>> tensor_parts(["base_model.model.h.0.q.lora_A.weight", "base_model.model.h.0.q.base_layer.bias"])
    {'h.0.q.weight': {'A': 'base_model.model.h.0.q.lora_A.weight'}, \
'h.0.q.bias': {'full': 'base_model.model.h.0.q.base_layer.bias'}}
    """
    found: dict[str, dict[str, str]] = {}
    present = set(names)
    for name in names:
        module, saved, rest = name.partition(SAVED)
        again = {f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"}  # with the adapter's name in between, or not
        if ORIGINAL in name or (saved and not again.isdisjoint(present)):
            continue
        target, part = _target(name.removeprefix(PREFIX))
        if FOREIGN.search(target):
            raise _unknown(name, "peft's LoRA of linear, embedding and convolution layers has no such part")
        parts = found.setdefault(target, {})
        if part in parts:
            raise _unknown(name, f"{shown(parts[part])} is the same part")
        parts[part] = name
    return found


def is_embedding(parts: Mapping[str, str]) -> bool:
    """True where A, which must be there, is an embedding's."""
    return parts[A].endswith("lora_embedding_A")


def _target(name: str) -> tuple[str, str]:
    """(tensor of the model, part)"""
    for end, part in PARTS.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(end) + ("bias" if part == OFFSET else "weight"), part
    module, dot, last = name.rpartition(".")
    return module.removesuffix(".base_layer") + dot + last, FULL


def _unknown(name: str, why: str) -> BadSchema:
    return BadSchema(
        Reason.UNEXPECTED_TENSOR,
        f"{shown(name)} is not known of LoRA adapters: {why}",
        "save the adapter with peft's save_pretrained, or merge it first (merge_and_unload()) and drop the whole model",
    )
