"""Heads: what they are called, which of an expert's are its own, and which stand for one of the base's.

A head is set aside, or the base's stays, where the other has none that could be it. One that could is made the base's,
or refused: what it learnt must not be lost.
"""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType

from projector.errors import BadSchema, Reason
from projector.names.naming import IN_ABOUT, globs, in_about, with_parts
from projector.text import shown

Shape = tuple[int, ...]

HEADS = frozenset(
    (
        *("head", "lm_head", "cls", "classifier", "pre_classifier", "score", "pooler", "classification_head", "logits"),
        *("qa_outputs", "qa_classifier", "qa_output", "seq_relationship", "sop_classifier", "predictions", "lm_loss"),
        *("generator_predictions", "generator_lm_head", "discriminator_predictions", "sequence_summary", "mlm_head"),
        *("vocab_transform", "vocab_layer_norm", "vocab_projector", "embed_out", "output_projection", "pred_layer"),
        *("multiple_choice_head", "start_logits", "end_logits", "answer_class", "logits_proj", "v_head", "value_head"),
        *("final_logits_bias", "nsp_head", "itm_head", "proj_out", "ctc_head", "reward_head", "regressor"),
        "mtp",  # of multi-token prediction
    )
)
"""What heads are called. A base's own may be missing; of an expert's, others are heads too."""

OF_PAIRS = re.compile(r"(^|\.)(seq_relationship|nsp_head|sop_classifier)\.")
"""Heads of a pretraining that tells whether two texts belong together: two rows, as many a classifier has, which is
none of these."""

OPTIONAL = frozenset(("pooler", "mtp"))
"""Heads that a model is often saved without, whatever its task: transformers neither loads nor saves an `mtp`."""

BODY = re.compile(
    r"embed|norm|^ln|^bn|layer|block|stage|conv|encoder|decoder|position|rotary|rope|attention|attn|mlp|ffn|router|gate"
    r"|prompt|token|lora|adapter|expert|model|tower|visual|vision|multi_modal|mm_|resampler|perceiver|qformer|connector|backbone|ema|teacher|student|momentum|copy|ref|old|^\d+$",
    re.IGNORECASE,
)
"""What a module is called that is no head, which may change what the body does."""
HEADISH = re.compile(r"(classif\w*|heads?|scorer?|logits?|regressor|pooler|predict\w*)$", re.IGNORECASE)
"""And what is one all the same."""

INNER = re.compile(r"(^|_)\d+$|attn|attention|mlp|block|layer", re.IGNORECASE)
"""What holds a part of the body: a `proj_out` in it is none of a head."""

LAYER = re.compile(r"([^.]+\.)?(?<![^.])\d+\..*$")
"""A tensor of a layer, from the name of the list of layers on."""
FOREIGN = re.compile(r"(^|\.)(lora_|ia3_|adapter|prompt_|prefix_encoder|modules_to_save|original_module|base_layer)")
MOST_GLOBS = 64


def ends_with(name: str, parts: str) -> bool:
    """True where the name ends with these parts, whole ones."""
    return name.endswith(parts) and (name == parts or name[-len(parts) - 1] == ".")


def common_parts(names: Collection[str]) -> int:
    """How many parts all of these names begin with."""
    first, last = min(names).split("."), max(names).split(".")
    return next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first) - 1)


def is_head(name: str) -> bool:
    """True for a tensor of a head, by what heads are called."""
    return not HEADS.isdisjoint(name.split("."))


def own_heads(extra: Sequence[str], used: Sequence[str]) -> list[str]:
    """Globs of these tensors, which are none of the base's, where all are of heads; none otherwise.

    A head lies beside the body, or beside a part of it that holds all of it: nothing of a layer is one.
    """
    body = [name for name in used if not is_head(name)] or list(used)
    if not extra or not body:
        return []
    root = body[0].split(".")[: common_parts(body)]
    layers = {found[0] for found in map(LAYER.search, body) if found}
    again = any(tail in layers for name in extra for tail in _tails(name))  # a part of the body, once more
    if again or any(map(FOREIGN.search, extra)):
        return []
    layered = any(map(LAYER.search, extra))
    found = globs(extra, used)
    return found if len(found) <= MOST_GLOBS and all(_is_own(glob, root, layered) for glob in found) else []


def _tails(name: str) -> Iterator[str]:
    """What the name ends with, in whole parts, the longest first."""
    tail, dot = name, "."
    while dot:
        yield tail
        _, dot, tail = tail.partition(".")


def _is_own(glob: str, root: Sequence[str], layered: bool) -> bool:
    """True for the glob of a head, by its name and where it lies. root: the parts that the body's names begin with.
    layered: it has layers of its own, as a second body has."""
    *above, last = glob.removesuffix(".*").split(".")
    if any(map(INNER.search, above)):
        return False
    if last in HEADS:
        return True
    own = glob.endswith(".*") and above == list(root[: len(above)])
    return own and (HEADISH.search(last) is not None or not (BODY.search(last) or layered))


def lacking(missing: Sequence[str], found: Sequence[str], *, other_task: bool) -> list[str]:
    """Globs of the tensors of the base that the expert may lack: whole heads of the base's, where the expert has one of
    its own in their place or is a body alone. What models are saved without nobody has to bring."""
    lost = globs(missing, found)
    heads = all(last in HEADS and not any(map(INNER.search, above)) for *above, last in map(_module, lost))
    optional = all(_module(glob)[-1] in OPTIONAL for glob in lost)
    return lost if found and heads and (other_task or optional) else []


def _module(glob: str) -> list[str]:
    return glob.removesuffix(".*").split(".")


def counterparts(
    parts: Mapping[str, str],
    extra: Mapping[str, Shape],
    absent: Mapping[str, Shape],
    resized: Mapping[int, int] = MappingProxyType({}),
) -> dict[str, str]:
    """Prefixes that make of heads among `extra` those of the base that are absent: what begins their names differs, all
    from the head's own on is the same, and so is every shape; in one way alone.

    parts: as of `Naming`. resized: as for `_alike`. Takes a time that grows with the number of tensors.
    """
    tails: dict[str, list[str]] = {}
    for name in filter(is_head, absent):
        tails.setdefault(_from_head(name), []).append(name)
    found: dict[str, dict[str, str]] = {tail: {} for tail in tails}
    inner = {part: new for part, new in parts.items() if not new}
    for name in extra if tails else ():
        for key in (with_parts(name, inner), with_parts(name, parts)):
            for tail in _tails(key):
                if tail in found and not INNER.search(key.removesuffix(tail)):
                    found[tail].setdefault(name, key)
    pairs: dict[str, str] = {}
    torn: set[str] = set()
    for tail, names in found.items():
        head = tail.partition(".")[0]
        for name, key in names.items():
            theirs, ours = (whole.removesuffix(tail) + head for whole in (key, tails[tail][0]))
            alone = len(names) == len(tails[tail]) == 1 and pairs.setdefault(theirs, ours) == ours
            if not alone or extra[name] not in _alike(absent[tails[tail][0]], resized):
                torn.add(theirs)
    return {theirs: ours for theirs, ours in pairs.items() if theirs not in torn}


def check_none_lost(
    extra: Mapping[str, Shape],
    stays: Mapping[str, Shape],
    inner: Collection[Shape],
    lost: Sequence[str],
    used: Collection[str],
    resized: Mapping[int, int] = MappingProxyType({}),
) -> None:
    """Raises BadSchema where a tensor that would be left out could be one of the base's that would stay as it is.

    inner: the shapes of what layers hold, which tell no head from another, unless all of both are alike. lost: globs of
    what would stay. used: the expert's other names. resized: as for `_alike`.
    """
    same = Counter(extra.values()) == Counter(stays.values())
    ending: dict[tuple[Shape, str], str] = {}
    for name, shape in extra.items():
        if set(shape) - {1} and (same or shape not in inner):
            for tail in (*_tails(name), ""):
                ending.setdefault((shape, tail), name)
    could: dict[str, str] = {}
    for ours, wanted in stays.items():
        tails = (*_tails(ours), "")
        found = (ending.get((shape, tail)) for tail in tails for shape in _alike(wanted, resized))
        theirs = next(filter(None, found), None)
        if theirs and not (OF_PAIRS.search(ours) and is_head(theirs) and not OF_PAIRS.search(theirs)):
            could[ours] = theirs
    if not could:
        return
    pairs = dict(map(_apart, could.values(), could))
    ours, theirs = next(iter(could.items()))
    own = in_about(ignore=globs(dict.fromkeys(could.values()), used), unchanged=list(lost))
    raise BadSchema(
        Reason.UNEXPECTED_TENSOR,
        f"{shown(theirs)} is not the base's, and could be {shown(ours)}, which it has not: it has that shape",
        f"if it is, put prefixes = {json.dumps(pairs).replace(': ', ' = ')} under [admission] in mainstem.toml, or drop"
        f" it with {in_about(prefixes=pairs) or IN_ABOUT}; if it is a head of its own, and the base's is to stay as it"
        f" is, drop it with {own or f'{IN_ABOUT} what to ignore and what is unchanged (docs/experts.md)'}",
    )


def _from_head(name: str) -> str:
    """What is left of the name from the head's own part on."""
    parts = name.split(".")
    return ".".join(parts[next(at for at, part in enumerate(parts) if part in HEADS) :])


def _apart(theirs: str, ours: str) -> tuple[str, str]:
    """Two names without the parts in which both end; one part of each stays."""
    a, b = theirs.split("."), ours.split(".")
    while len(a) > 1 and len(b) > 1 and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return ".".join(a), ".".join(b)


def _alike(ours: Shape, resized: Mapping[int, int]) -> set[Shape]:
    """The shapes that an expert's tensor may have that is the base's of this one. resized: the rows of an embedding of
    the base -> the expert's, where the vocabulary is another; the output layer's go with it."""
    return {ours, (resized[ours[0]], *ours[1:])} if ours and ours[0] in resized else {ours}
