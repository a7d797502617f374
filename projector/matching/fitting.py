"""What an expert's names need to become the base's, where there is one way alone: prefixes, wrappers, heads.

A fine-tuned model is seldom saved as its base was: DistributedDataParallel puts `module.` before every name, a
classifier over an encoder has `bert.` there and a head of its own, and lacks the base's. What follows from the names
alone is added to the `Naming`; what could be meant in two ways is refused, and what is no head somebody has to name.

What this adds is noted with the expert, and read by from then on: what is added to others later may be other things.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from projector.errors import BadSchema, Reason
from projector.files.source import Checkpoint
from projector.matching.task_heads import (
    LAYER,
    check_none_lost,
    common_parts,
    counterparts,
    ends_with,
    is_head,
    lacking,
    own_heads,
)
from projector.names.naming import IN_ABOUT, NUMBER, Naming, in_about, with_parts
from projector.names.quantised import check_not_quantised
from projector.spec import Schema, resized_rows, sole_twins
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

COUNTED = re.compile(r"(^|\.)\d+\.")


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
    bare = any(name != ours and ours.endswith(f".{name}") for ours, name in found.items())
    resized = _resized(found, theirs, wanted)
    naming, own = _with_heads(naming, theirs, wanted, resized, tied=tied)
    found, extra = _read(naming, theirs, wanted)
    missing = [name for name in missing if name not in found]
    heads = own_heads(own, list(found.values()))
    lost = lacking(missing, list(found), other_task=bare or bool(heads))
    stays = [name for name in wanted if name not in found and not naming.lacks(name) and (lost or name not in missing)]
    if extra and stays:
        again = expert.twins() if not lost else {}  # what the base ties is left out where it is the same
        known = set(found.values())
        check_none_lost(
            {name: theirs[name].shape for name in extra if known.isdisjoint(again.get(name, ()))},
            {name: wanted[name].shape for name in stays},
            {wanted[name].shape for name in found if LAYER.search(name)},
            lost,
            list(found.values()),
            resized,
        )
    return replace(naming, ignore=(*naming.ignore, *heads), unchanged=(*naming.unchanged, *lost))


def _with_heads(
    naming: Naming, theirs: Schema, wanted: Schema, resized: Mapping[int, int], *, tied: bool
) -> tuple[Naming, list[str]]:
    """With what makes heads of the base's of what the base has not, and what may be a head of its own after that; as it
    was where something else would still be left."""

    def left(names: Iterable[str]) -> list[str]:
        output = dict(sole_twins(wanted, (theirs[name] for name in names))) if tied else {}
        return [name for name in names if name not in output]

    found, extra = _read(naming, theirs, wanted)
    absent = {name: spec.shape for name, spec in wanted.items() if name not in found and not naming.lacks(name)}
    pairs = counterparts(naming.parts, {name: theirs[name].shape for name in extra}, absent, resized)
    if pairs:
        again = replace(naming, prefixes={**naming.prefixes, **pairs})
        found, rest = _read(again, theirs, wanted)
        own = left(rest)
        if not own or own_heads(own, list(found.values())):
            return again, own
    return naming, left(extra)


def _resized(found: Mapping[str, str], theirs: Schema, wanted: Schema) -> dict[int, int]:
    """How many rows an embedding of the base has -> how many in the expert, where that differs."""
    shapes = ((wanted[ours].shape, theirs[name].shape) for ours, name in found.items())
    return {ours[0]: other[0] for ours, other in shapes if ours != other and resized_rows(ours, other)}


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


def _ambiguous(openings: Iterable[str]) -> BadSchema:
    globbed = [f"{opening}*" for opening in sorted(set(openings), key=lambda opening: (len(opening), opening))]
    return BadSchema(
        Reason.UNEXPECTED_TENSOR,
        f"it has all of the base's tensors {len(globbed)} times: {listed(globbed)}",
        f"leave all but one of them out; or drop it with {in_about(ignore=globbed[1:4]) or IN_ABOUT}",
    )
