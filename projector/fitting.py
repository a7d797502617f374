"""What an expert's names need to become the base's, where there is one way alone: prefixes, wrappers, heads.

A fine-tuned model is seldom saved as its base was: DistributedDataParallel puts `module.` before every name, a
classifier over an encoder has `bert.` there and a head of its own, and lacks the base's. What follows from the names
alone is added to the `Naming`; what could be meant in two ways is refused, and what is no head somebody has to name.

What this adds is noted with the expert, and read by from then on: what is added to others later may be other things.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from projector.errors import BadSchema, Reason
from projector.naming import IN_ABOUT, Naming, globs, in_about, with_parts
from projector.quantised import check_not_quantised
from projector.source import Checkpoint
from projector.spec import Schema, sole_twins
from projector.text import listed

WRAPPERS = (
    *("module", "_orig_mod", "_forward_module"),  # DistributedDataParallel, torch.compile, Lightning's Fabric
    *("_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module"),  # FSDP, and activation checkpointing
)
"""Parts of a name that are no module of the model, but what it was wrapped in."""

OLD_NORM = {"gamma": "weight", "beta": "bias"}
"""What TensorFlow called the parameters of a norm, and so did the first files of BERT."""

LLAVA = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
QWEN_VL = {"model.language_model.": "model.", "model.visual.": "visual."}
NORMED = re.compile(
    r"(?P<module>|.+\.)(?:parametrizations\.(?P<new>\w+)\.original(?P<part>[01])|(?P<old>\w+)_(?P<letter>[gv]))"
)
"""The two parameters of a weight norm, as torch.nn.utils.parametrizations calls them and as torch.nn.utils did."""

RENAMED = tuple(table for one in (LLAVA, QWEN_VL) for table in (one, {ours: theirs for theirs, ours in one.items()}))
"""What transformers 5 calls the parts of a model otherwise than its files do, and the other way round."""

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

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
COUNTED = re.compile(r"(^|\.)\d+\.")
LAYER = re.compile(r"([^.]+\.)?(?<![^.])\d+\..*$")
"""A tensor of a layer, from the name of the list of layers on."""
FOREIGN = re.compile(r"(^|\.)(lora_|ia3_|adapter|prompt_|prefix_encoder|modules_to_save|original_module|base_layer)")
MOST_GLOBS = 64


def fitted(naming: Naming, expert: Checkpoint, base: Checkpoint, *, tied: bool) -> Naming:
    """The naming by which the expert is to be read: with what makes it fit, as far as `naming` is lenient.

    tied: the base's output layer may be its embedding, so that a matrix of the embedding's shape is no head.
    Raises BadSchema where it would fit in several ways. Takes a time that grows with the number of tensors.
    """
    if not naming.lenient:
        return naming
    wanted, theirs = _merged(base.schema), _merged(expert.schema)
    found, extra = _read(naming, theirs, wanted)
    if len(found) == len(wanted) and not extra:
        return naming
    check_not_quantised(extra)
    if normed := _normed(extra, wanted):
        naming = replace(naming, prefixes={**naming.prefixes, **normed})
        found, extra = _read(naming, theirs, wanted)
    naming = _renamed(naming, theirs, base, found, extra)
    found, extra = _read(naming, theirs, wanted)
    twins = base.twins() if len(found) < len(wanted) else {}
    missing = [name for name in wanted if name not in found and found.keys().isdisjoint(twins.get(name, ()))]
    missing = [name for name in missing if not naming.lacks(name)]
    output = dict(sole_twins(base.schema, (expert.schema[name] for name in extra))) if tied else {}
    own = [name for name in extra if name not in output]
    bare = any(name != ours and ours.endswith(f".{name}") for ours, name in found.items())
    heads = own_heads(own, list(found.values()))
    lacking = _lacking(missing, list(found), other_task=bare or bool(heads))
    return replace(naming, ignore=(*naming.ignore, *heads), unchanged=(*naming.unchanged, *lacking))


def _normed(extra: Iterable[str], wanted: Schema) -> dict[str, str]:
    """What makes the base's of the parameters of weight norms, where they have their other names; layers as one."""
    found = {}
    for name in extra:
        if norm := NORMED.fullmatch(name):
            ours = (
                f"{norm['module']}{norm['new']}_{'gv'[int(norm['part'])]}"
                if norm["new"]
                else f"{norm['module']}parametrizations.{norm['old']}.original{'gv'.index(norm['letter'])}"
            )
            if ours in wanted:
                found[NUMBER.sub("*", name)] = NUMBER.sub("*", ours)
    return found


def _merged(schema: Schema) -> Schema:
    return {name: spec for name, spec in schema.items() if spec.merged}


def _read(naming: Naming, theirs: Schema, wanted: Schema) -> tuple[dict[str, str], list[str]]:
    """By the base's names, what is found under which; and the names of tensors that the base has not."""
    resolved = naming.resolve(theirs, wanted)
    found = {ours: name for name, ours in resolved.items() if ours in wanted}
    return found, [name for name, ours in resolved.items() if ours not in wanted]


def _renamed(
    naming: Naming, theirs: Schema, base: Checkpoint, found: Mapping[str, str], extra: Sequence[str]
) -> Naming:
    """With the one prefix, the parts, or the known renaming that make the base's body of what the base has not."""
    wanted = _merged(base.schema)
    needed = [name for name in wanted if not naming.lacks(name)]
    body = [name for name in needed if not is_head(name)] or needed
    missing = [name for name in body if name not in found]
    if len(extra) < len(missing) // 2 or (not missing and len(extra) < len(body)):
        return naming
    if not body:
        return naming
    copies = _Copies(extra, missing or body, base)
    pairs = copies.complete()
    if len(pairs) + (not missing) > 1:
        fitting = [pair for pair in pairs if copies.like(pair, theirs)]
        if len(fitting) + (not missing) > 1:
            raise _ambiguous([*([] if missing else [""]), *map(copies.shown, fitting)])
        pairs = fitting or pairs[:1]
    if not missing:
        return naming
    whole = len(missing) == len(body)  # else some have their names already, and the rest could be anything
    if pairs and (whole or pairs[0] == ("", "")):
        return _with(naming, pairs[0], copies.parts)
    for table in RENAMED:
        if any(name.startswith(next(iter(table))) for name in copies.keys):
            again = replace(naming, prefixes={**naming.prefixes, **table}, parts=copies.parts)
            if len(_read(again, theirs, wanted)[0].keys() & body) == len(body):
                return again
    likely = copies.likely() if whole else None
    return _with(naming, likely, copies.parts) if likely else naming


def _with(naming: Naming, pair: tuple[str, str], parts: Mapping[str, str]) -> Naming:
    theirs, ours = pair
    prefixes = naming.prefixes if theirs == ours else {**naming.prefixes, theirs: ours}
    return replace(naming, prefixes=prefixes, parts={**naming.parts, **parts})


class _Copies:
    """The tensors that the base has not, by the names that they have without wrappers, held against some of the base's.

    parts: what was made of parts of their names. keys: those names, and what each is in the expert.
    """

    def __init__(self, extra: Sequence[str], missing: Sequence[str], base: Checkpoint) -> None:
        there = {part for name in extra for part in name.split(".")}
        at_home = {part for name in missing for part in name.split(".")}
        self.parts = {part: "" for part in WRAPPERS if part in there - at_home}
        for old, new in OLD_NORM.items():
            if old in at_home and old not in there:
                self.parts[new] = old
            elif old in there and old not in at_home:
                self.parts[old] = new
        self._norm = {old: new for old, new in OLD_NORM.items() if (old in there) != (old in at_home)}
        plain = {part: "" for part, new in self.parts.items() if not new} | self._norm
        self.keys = {with_parts(name, plain): name for name in extra}
        self._wanted = {with_parts(name, self._norm): name for name in missing}
        self._base = base

    def complete(self) -> list[tuple[str, str]]:
        """Every pair of prefixes that makes all that is missing of what is there."""
        return [pair for pair in self._pairs() if self._completes(pair)]

    def like(self, pair: tuple[str, str], theirs: Schema) -> bool:
        """True where what the pair makes has the shapes of the base's."""
        made = ((ours, self.keys.get(self._made(pair, key))) for key, ours in self._wanted.items())
        return all(name is None or theirs[name].shape == self._base.schema[ours].shape for ours, name in made)

    def shown(self, pair: tuple[str, str]) -> str:
        """What the names of that copy begin with, or have in them, as a glob without its last *."""
        wrapper = next((part for part, new in self.parts.items() if not new), "")
        return pair[0] or (f"*{wrapper}." if wrapper else "")

    def likely(self) -> tuple[str, str] | None:
        """The pair that makes most of what is missing, if it makes more than half: what to say of the rest."""
        made = {pair: sum(self._made(pair, key) in self.keys for key in self._wanted) for pair in self._few()}
        best = max(made, key=lambda pair: made[pair], default=None)
        return best if best and made[best] * 2 > len(self._wanted) else None

    def _few(self) -> list[tuple[str, str]]:
        return [pair for pair, _ in zip(self._pairs(), range(4), strict=False)]

    def _pairs(self) -> Iterator[tuple[str, str]]:
        """What could stand for what all that is missing begins with. Of the longest name more than its last part must
        stay: any two modules have a "weight"."""
        probe = min(self._wanted, key=lambda name: (-name.count("."), name))
        parts = probe.split(".")
        for cut in range(min(common_parts(self._wanted), max(0, len(parts) - 2)) + 1):
            ours = "".join(f"{part}." for part in parts[:cut])
            tail = probe.removeprefix(ours)
            longer = f"{parts[cut - 1]}.{tail}" if cut else None  # with which the pair has been found already
            yield from (
                (name.removesuffix(tail), ours)
                for name in self.keys
                if ends_with(name, tail) and not (longer and ends_with(name, longer))
            )

    def _completes(self, pair: tuple[str, str]) -> bool:
        lacking = (ours for key, ours in self._wanted.items() if self._made(pair, key) not in self.keys)
        return all(
            any(
                self._made(pair, with_parts(twin, self._norm)) in self.keys for twin in self._base.twins().get(ours, ())
            )
            for ours in lacking
        )

    @staticmethod
    def _made(pair: tuple[str, str], key: str) -> str:
        theirs, ours = pair
        return theirs + key.removeprefix(ours)


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


def _lacking(missing: Sequence[str], found: Sequence[str], *, other_task: bool) -> list[str]:
    """Globs of the tensors of the base that the expert may lack: whole heads of the base's, where the expert has one of
    its own in their place or is a body alone. What models are saved without nobody has to bring."""
    lost = globs(missing, found)
    heads = all(last in HEADS and not any(map(INNER.search, above)) for *above, last in map(_module, lost))
    optional = all(_module(glob)[-1] in OPTIONAL for glob in lost)
    return lost if found and heads and (other_task or optional) else []


def _module(glob: str) -> list[str]:
    return glob.removesuffix(".*").split(".")


def _ambiguous(openings: Iterable[str]) -> BadSchema:
    globbed = [f"{opening}*" for opening in sorted(set(openings), key=lambda opening: (len(opening), opening))]
    return BadSchema(
        Reason.UNEXPECTED_TENSOR,
        f"it has all of the base's tensors {len(globbed)} times: {listed(globbed)}",
        f"leave all but one of them out; or drop it with {in_about(ignore=globbed[1:4]) or IN_ABOUT}",
    )
