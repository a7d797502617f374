"""What to say where an adapter changes a tensor that the base has not."""

import json
from collections.abc import Mapping
from itertools import takewhile
from operator import eq

from projector.errors import BadSchema, Reason
from projector.lora.config import MERGE_FIRST
from projector.lora.families import family_pairs
from projector.lora.keys import FULL, OFFSET, A, is_embedding
from projector.names.naming import LONGEST_HINT, Naming, fitting_prefix
from projector.spec import OTHER_MODEL, Schema
from projector.text import shown

ANOTHER_BASE = "train it on this home's base"
Shape = tuple[int, ...]


def absent(
    target: str, parts: Mapping[str, str], unknown: Mapping[str, Shape], base: Schema, naming: Naming, known: bool
) -> BadSchema:
    """The error for `target`, a tensor of the model as the adapter has it, which has these parts.

    unknown: the shapes of all tensors that the base has not, () where the adapter does not say. known: the base has
    others that the adapter changes.
    """
    shape, reason = unknown[target], Reason.UNEXPECTED_TENSOR
    alike = [name for name, spec in base.items() if len(shape) > 1 and spec.shape == shape]
    words = _words(target)
    if OFFSET in parts:
        detail, hint = "lora_bias adds to it", "train without lora_bias: the base's layer has no bias to add to"
    elif pair := _prefix(target, unknown, base):
        put = f"add {pair} to admission.prefixes" if naming.prefixes else f"put prefixes = {{{pair}}} under [admission]"
        detail, hint = "by that name", f"{put} in mainstem.toml"
    elif len(alike) == 1:
        detail = f"if it is tied to {shown(alike[0])}, the two cannot change apart"
        hint = "train the embedding instead, or give this home a base in which the two are not tied"
    elif A in parts and is_embedding(parts) and any(_words(name)[-2:] == words[-2:] for name in alike):
        detail = "if it is tied to another tensor there, the two cannot change apart"
        hint = f"train that tensor instead, or {ANOTHER_BASE}; if it is a head of its own, name it in admission.ignore"
    elif any(_words(name) == words for name in base):
        detail, hint = "nothing there has that name", f"{ANOTHER_BASE}, of as many layers"
    elif not known and not _akin(unknown, base):
        reason = Reason.WRONG_BASE
        detail, hint = "nor anything of the shape of what this adapter changes", OTHER_MODEL
    elif FULL not in parts or not known:
        reason = reason if known else Reason.WRONG_BASE
        detail = "nothing there has that name" if known else "nor anything else that this adapter changes"
        hint = f"{ANOTHER_BASE}; {_renamed(target, unknown, base)}"
        if made := naming.tried(target):
            detail = f"nor {shown(made[0])}, which admission.prefixes makes of it"
            hint = f"mend that pair{_closest(made[0], base)}, or {ANOTHER_BASE}"
    else:
        setting = f"ignore = {json.dumps([target.rpartition('.')[0] + '.*'])}"
        detail = "nothing there is like it"
        put = f"put {setting} under [admission]" if len(setting) <= LONGEST_HINT else "name it in admission.ignore"
        hint = f"if it is a head of its own, {put} in mainstem.toml; if not, {ANOTHER_BASE}"
    return BadSchema(reason, f"the base has no {shown(target)}: {detail}", hint)


def _akin(unknown: Mapping[str, Shape], base: Schema) -> bool:
    """True where the base has a tensor of the shape of one of these, turned round or not, or where nobody knows."""
    there = {tuple(sorted(spec.shape)) for spec in base.values()}
    known = [shape for shape in unknown.values() if shape]
    return not known or any(tuple(sorted(shape)) in there for shape in known)


def _words(name: str) -> list[str]:
    """The parts of a name but for the numbers, which count layers."""
    return [part for part in name.split(".") if not part.isdigit()]


def _closest(name: str, base: Schema) -> str:
    """Names the tensor of the base that begins most like it, if any does."""
    parts = name.split(".")
    alike = {other: sum(takewhile(bool, map(eq, parts, other.split(".")))) for other in base}
    closest = max(alike, key=lambda other: alike[other])
    return f" (the base has {shown(closest)})" if alike[closest] else ""


def _prefix(target: str, unknown: Mapping[str, Shape], base: Schema) -> str | None:
    """The pair in admission.prefixes with which the base would have it; None where no one pair helps."""
    if len(target) > LONGEST_HINT:
        return None
    pair = fitting_prefix(target, unknown, {name: spec.shape for name, spec in base.items()})
    words = " = ".join(map(json.dumps, pair or ()))
    return words if 0 < len(words) <= LONGEST_HINT else None


def _renamed(target: str, unknown: Mapping[str, Shape], base: Schema) -> str:
    """What helps where the module has another name in the base's files."""
    if pairs := family_pairs(unknown, base):
        lines = ", ".join(f"{json.dumps(theirs)} = {json.dumps(ours)}" for theirs, ours in pairs.items())
        return (
            "or, as transformers calls the modules of this model otherwise than its files do, put prefixes ="
            f" {{{lines}}} under [admission] in mainstem.toml (docs/adapters.md, Names); or {MERGE_FIRST}"
        )
    module = ".".join("*" if part.isdigit() else part for part in target.split(".")[:-1])
    pair = f', {json.dumps(module)} = "..."' if len(module) <= LONGEST_HINT else ""
    return (
        "where transformers calls the modules of this model otherwise than its files do, put what the files call each"
        f" into [admission.prefixes]{pair} (docs/adapters.md, Names), or {MERGE_FIRST}"
    )
