"""What the tensors of a PEFT adapter are called: which tensor of the model each changes, and which part it is."""

import json
import re
from collections.abc import Collection, Iterable, Mapping

from projector.errors import BadSchema, Reason
from projector.text import OUT, listed, shown

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
OUTER = re.compile(r"^(?P<wrapper>(?:[^.]+\.)*?)base_model\.model\.")
WRAPPERS = re.compile(
    r"(^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.)"
)
NAMED = re.compile(
    r"\.(lora_[AB]|lora_magnitude_vector)\.(?P<first>[^.]+)\.(weight|bias)$"
    r"|\.(lora_embedding_[AB]|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)\.(?P<last>(?!weight$)[^.]+)$"
)
"""A tensor's name with the adapter's name in it, as model.state_dict() has it and save_pretrained has not."""
INNER = (".base_layer", ".token_adapter")
FOREIGN = re.compile(r"(^|\.)(lora_\w+|token_adapter|modules_to_save|original_module|base_layer)(\.|$)")


def tensor_parts(names: Collection[str]) -> dict[str, dict[str, str]]:
    """Of each tensor of the model that an adapter changes its parts, and for each of them its name in the adapter.

    The adapter's own name may be left in them, as in model.state_dict(), and the model may have been wrapped. Left out
    are the original of a module of modules_to_save, and the trained one where PEFT, training all biases, saved it a
    second time. Raises BadSchema at a name that is none of PEFT's for LoRA, and where there are several adapters.

    >>> tensor_parts(["base_model.model.h.0.q.lora_A.weight", "base_model.model.h.0.q.base_layer.bias"])
    {'h.0.q.weight': {'A': 'base_model.model.h.0.q.lora_A.weight'}, \
'h.0.q.bias': {'full': 'base_model.model.h.0.q.base_layer.bias'}}
    >>> tensor_parts(["module.base_model.model.h.0.q.lora_A.french.weight"])
    {'h.0.q.weight': {'A': 'module.base_model.model.h.0.q.lora_A.french.weight'}}
    """
    found: dict[str, dict[str, str]] = {}
    present, adapter = set(names), _adapter_name(names)
    for name in names:
        module, saved, rest = name.partition(SAVED)
        again = {f"{module}.{rest}", f"{module}.{rest.partition('.')[2]}"}  # with the adapter's name in between, or not
        if ORIGINAL in name or (saved and not again.isdisjoint(present)):
            continue
        target, part = _target(OUTER.sub("", _without_adapter(name, adapter)))
        if FOREIGN.search(target):
            raise _unknown(name, "peft's LoRA of linear, embedding and convolution layers has no such part")
        parts = found.setdefault(target, {})
        if part in parts:
            raise _unknown(name, f"{shown(parts[part])} is the same part")
        parts[part] = name
    return found


def wrapped(target: str, parts: Mapping[str, str]) -> str:
    """`target` behind what stands before base_model.model. in the adapter's names, as module. does; else as it is."""
    outer = OUTER.match(next(iter(parts.values())))
    return outer[0] + target if outer and outer["wrapper"] else target


def module_names(target: str, ours: str, parts: Mapping[str, str]) -> list[str]:
    """What PEFT may have called the module when it looked at the patterns of its config; the likeliest first.

    That is what follows base_model.model., less the wrappers that a model may get once the adapter is in it. Without
    base_model.model. somebody renamed the tensors, and what the base calls it is as likely.
    """
    found = [target, WRAPPERS.sub("", target)]
    if not OUTER.match(next(iter(parts.values()))):
        found.append(ours)
    return list(dict.fromkeys(name.rpartition(".")[0] for name in found))


def _adapter_name(names: Iterable[str]) -> str | None:
    """The adapter's name that is left in the names; None where there is none."""
    found = (NAMED.search(name) for name in names)
    adapters = sorted({match["first"] or match["last"] for match in found if match})
    if len(adapters) > 1:
        first = next(name for name in adapters if name != "default")  # which would not get a folder of its own
        raise BadSchema(
            Reason.UNEXPECTED_TENSOR,
            f"the file holds several adapters: {listed(adapters)}",
            f'save one of them alone, such as {shown(first)}: model.save_pretrained("{OUT}", selected_adapters='
            f'[{json.dumps(first)}]), and drop "{OUT}/{shown(first)}"',
        )
    return adapters[0] if adapters else None


def _without_adapter(name: str, adapter: str | None) -> str:
    """The name as save_pretrained writes it."""
    module, saved, rest = name.partition(SAVED)
    if saved and adapter and rest.startswith(f"{adapter}."):
        return f"{module}.{rest.removeprefix(f'{adapter}.')}"
    if found := NAMED.search(name):
        kind = "first" if found["first"] else "last"
        return name[: found.start(kind) - 1] + name[found.end(kind) :]
    return name


def is_embedding(parts: Mapping[str, str]) -> bool:
    """True where A, which must be there, is an embedding's."""
    return ".lora_embedding_A" in parts[A]


def _target(name: str) -> tuple[str, str]:
    """(tensor of the model, part)"""
    for end, part in PARTS.items():
        if name.endswith(f".{end}"):
            return name.removesuffix(end) + ("bias" if part == OFFSET else "weight"), part
    module, dot, last = name.rpartition(".")
    for inner in INNER:
        module = module.removesuffix(inner)
    return module + dot + last, FULL


def _unknown(name: str, why: str) -> BadSchema:
    return BadSchema(
        Reason.UNEXPECTED_TENSOR,
        f"{shown(name)} is not known of LoRA adapters: {why}",
        "save the adapter with peft's save_pretrained, or merge it first (merge_and_unload()) and drop the whole model",
    )
