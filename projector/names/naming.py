"""How an expert's tensor names become the base's: prefixes that differ, and tensors that the base has not."""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from functools import cached_property, lru_cache
from glob import escape
from typing import Any

from projector.errors import BadSchema, Reason
from projector.text import shown

LONGEST_HINT = 200
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
IN_ABOUT = "an expert.json beside the weights, in one folder, that says"


@dataclass(frozen=True)
class Naming:
    """How an expert's names are read. All but `unchanged` is about the names as the expert has them.

    prefixes: what a name begins with in the expert -> what it begins with in the base; either may be "". A * stands for
    one whole part of a name, between dots; the base's n-th * is what the expert's n-th * is.
    ignore: globs (*, ?, [...]; a * also matches dots) of tensors that are left out.
    parts: whole parts of a name, wherever they stand -> what the base calls them; "" takes one out.
    unchanged: globs of the base's tensors that the expert may lack: it leaves them as they are.
    lenient: what fits in one way alone may be added to all these (`fitted`).

    >>> base = ["bert.embeddings.weight", "bert.pooler.weight"]
    >>> names = ["module.embeddings.weight", "module.pooler.weight", "module.classifier.weight"]
    >>> Naming({"module.": "bert."}, ["*.classifier.*"]).resolve(names, base)
    {'module.embeddings.weight': 'bert.embeddings.weight', 'module.pooler.weight': 'bert.pooler.weight'}
    >>> Naming({"layers.*.q_proj": "layer.*.query"}).resolve(["layers.7.q_proj.bias"], ["layer.7.query.bias"])
    {'layers.7.q_proj.bias': 'layer.7.query.bias'}
    >>> Naming(parts={"_orig_mod": "", "gamma": "weight"}).resolve(["h.0._orig_mod.norm.gamma"], ["h.0.norm.weight"])
    {'h.0._orig_mod.norm.gamma': 'h.0.norm.weight'}
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    ignore: Sequence[str] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    unchanged: Sequence[str] = ()
    lenient: bool = False

    def noted(self) -> dict[str, Any]:
        """What it says, ready for JSON, of which Naming reads the same; `prefixes` and `ignore` are always there."""
        found = {"prefixes": dict(self.prefixes), "ignore": list(self.ignore)}
        more = {"parts": dict(self.parts), "unchanged": list(self.unchanged)}
        return found | {key: value for key, value in more.items() if value}

    def resolve(self, names: Iterable[str], base: Collection[str]) -> dict[str, str]:
        """The expert's name -> the base's, for every name that is not ignored, in the order of `names`.

        For each name the first of these rules that holds:

        1. A name that the base has stays as it is: it is never renamed and never ignored.
        2. A name that a glob of `ignore` matches is left out.
        3. The prefixes that the name begins with are tried, the longest first, of equally long ones that with fewer *.
           The first whose replacement makes it a name of the base does so. One prefix is replaced, once.
        4. The same of the name with all those `parts` taken out that become "", then with the others replaced as well.
        5. Any other name stays as it is; whoever holds the names against the base finds it there.

        Raises BadSchema where two names become one. `base` should answer `in` quickly.
        """
        resolved: dict[str, str] = {}
        taken: dict[str, str] = {}
        for name in names:
            if name not in base and self.ignores(name):
                continue
            wanted = name if name in base else next((n for n in self.tried(name) if n in base), name)
            if wanted in taken:
                raise BadSchema(
                    Reason.UNEXPECTED_TENSOR,
                    f"{shown(taken[wanted])} and {shown(name)} are both {shown(wanted)} in the base",
                    "leave one of them out, or change admission.prefixes or admission.ignore",
                )
            taken[wanted] = name
            resolved[name] = wanted
        return resolved

    def tried(self, name: str) -> list[str]:
        """What the prefixes make of an expert's name, whether the base has it or not; the longest prefix first."""
        found = list(_renamed(name, self._longest_first))
        if self.parts:
            inner = with_parts(name, self._taken_out)
            for other in dict.fromkeys((inner, with_parts(inner, self.parts))):
                found += [] if other == name else [other, *_renamed(other, self._longest_first)]
        return found

    def lacks(self, name: str) -> bool:
        """True for a tensor of the base that the expert may lack."""
        return bool(self.unchanged) and _any_of(tuple(self.unchanged)).match(name) is not None

    def ignores(self, name: str) -> bool:
        """True for a name that is left out where the base has it not."""
        return bool(self.ignore) and _any_of(tuple(self.ignore)).match(name) is not None

    @cached_property
    def _taken_out(self) -> dict[str, str]:
        return {part: new for part, new in self.parts.items() if not new}

    @cached_property
    def _longest_first(self) -> list[tuple[str, str]]:
        return _longest_first(self.prefixes.items())

    def theirs(self, name: str) -> str:
        """What experts call this tensor of the base: the longest prefix of the base that its parts begin with, replaced
        back.

        >>> Naming({"layers.*.q_proj": "layer.*.query"}).theirs("layer.7.query.bias")
        'layers.7.q_proj.bias'
        """
        return next(_renamed(name, self._backwards), name)

    @cached_property
    def _backwards(self) -> list[tuple[str, str]]:
        return _longest_first((_closed(ours), _closed(theirs)) for theirs, ours in self.prefixes.items())


SAME = Naming()
"""Names as they are."""


def mending(missing: Sequence[str], unexpected: Sequence[str], known: Collection[str] = ()) -> str | None:
    """The settings that would make all that is missing out of what is unexpected, and leave out the rest of it, as they
    stand in mainstem.toml; None where one prefix and a few globs do not.

    known: the names that are the base's already.

    >>> mending(["embed.weight", "layer.0.weight"], ["model.embed.weight", "model.layer.0.weight", "head.weight"])
    'prefixes = {"model." = ""} and ignore = ["head.*"]'
    """
    found = mended(missing, unexpected, known)
    pairs = ", ".join(f"{json.dumps(theirs)} = {json.dumps(ours)}" for theirs, ours in found.prefixes.items())
    lines = [f"prefixes = {{{pairs}}}"] if pairs else []
    lines += [f"ignore = {json.dumps(list(found.ignore))}"] if found.ignore else []
    words = " and ".join(lines)
    return words if 0 < len(words) <= LONGEST_HINT else None


def mended(missing: Sequence[str], unexpected: Sequence[str], known: Collection[str] = ()) -> Naming:
    """The same, to be read by; `SAME` where there is nothing that would do."""
    pair, rest, used = _mending(missing, unexpected, known)
    if (missing and pair is None) or layers_beyond(rest, used):
        return SAME
    return Naming(dict([pair] if pair else []), globs(rest, used) if rest else ())


def more_layers(missing: Sequence[str], unexpected: Sequence[str], known: Collection[str] = ()) -> list[str]:
    """The layers, in the expert's names, that the base has not: to leave them out is no mending."""
    _, rest, used = _mending(missing, unexpected, known)
    return layers_beyond(rest, used)


def layers_beyond(names: Iterable[str], used: Collection[str]) -> list[str]:
    """The modules of these names that are one more of a list of which some are used.

    >>> layers_beyond(["h.2.q.weight", "h.2.k.weight", "head.weight"], ["h.0.q.weight", "h.1.q.weight"])
    ['h.2']
    """
    alike = {NUMBER.sub("*", name) for name in used}
    found = [name for name in names if NUMBER.sub("*", name) in alike]
    modules = (glob.removesuffix(".*") for glob in globs(found, used))
    return [module for module in modules if module.rpartition(".")[2].isdecimal()]


def _mending(
    missing: Sequence[str], unexpected: Sequence[str], known: Collection[str]
) -> tuple[tuple[str, str] | None, list[str], set[str]]:
    """The pair that makes all that is missing, if one copy of it is there; what is left over then, and which names are
    the base's."""
    pairs = [pair for pair in _pairs(missing, unexpected) if _mends(pair, missing, unexpected)]
    alone = len({theirs + missing[0].removeprefix(ours) for theirs, ours in pairs}) == 1
    pair = pairs[0] if alone else None
    used = set(known)
    if pair is not None:
        theirs, ours = pair
        wanted = set(missing)
        used |= {name for name in unexpected if name.startswith(theirs) and ours + name.removeprefix(theirs) in wanted}
    return pair, [name for name in unexpected if name not in used], used


def in_about(**fields: object) -> str | None:
    """What an expert.json has to say, in words that end a hint; None where that is too long, or nothing."""
    text = json.dumps({key: value for key, value in fields.items() if value})
    return f"{IN_ABOUT} {text}" if 2 < len(text) <= LONGEST_HINT else None


def fitting_prefix(
    name: str, unknown: Mapping[str, tuple[int, ...]], base: Mapping[str, tuple[int, ...]]
) -> tuple[str, str] | None:
    """The pair for `prefixes` that makes a tensor of the base of `name`, and of all that are unknown and begin alike.

    No pair of which a side counts layers: that is another layer, or a tied weight's other name. And none of two modules
    that have no more in common than what is in them ("dense.weight").
    unknown, base: names and shapes; a shape may be turned round, and () is any.
    """

    def fits(theirs: str, ours: str) -> bool:
        tail = name.removeprefix(theirs)
        akin = theirs.endswith(ours) or ours.endswith(theirs) or counted.search(tail)
        if not akin or "." not in tail or counted.search(theirs) or counted.search(ours):
            return False
        like = theirs or name.partition(".")[0]
        found = ((ours + one.removeprefix(theirs), shape) for one, shape in unknown.items() if one.startswith(like))
        return all(one in base and (not shape or sorted(shape) == sorted(base[one])) for one, shape in found)

    counted = re.compile(r"(^|\.)\d+\.")
    pairs = ((theirs, ours) for ours, theirs in _pairs([name], list(base)))
    return next((pair for pair in pairs if fits(*pair)), None)


def with_parts(name: str, parts: Mapping[str, str]) -> str:
    """The name with its parts replaced; those that become "" are taken out."""
    if not parts:
        return name
    return ".".join(new for new in (parts.get(part, part) for part in name.split(".")) if new)


def globs(names: Iterable[str], used: Iterable[str]) -> list[str]:
    """Globs for these names, each for as large a module as holds none of the names that are used.

    >>> globs(["m.head.0.weight", "m.head.0.bias", "m.mask[0]"], ["m.layer.weight"])
    ['m.head.*', 'm.mask[[]0]']
    """
    taken = {name[:dot] for name in used for dot in _dots(name)}
    modules = ((name, next((name[:dot] for dot in _dots(name) if name[:dot] not in taken), None)) for name in names)
    return sorted({f"{escape(module)}.*" if module else escape(name) for name, module in modules})


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _pairs(missing: Sequence[str], unexpected: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What could be replaced by what: of the first missing name as much as possible stays, in whole parts.

    More than the last part must stay: any two modules have a "weight".
    """
    if not missing:
        return
    parts = missing[0].split(".")
    for cut in range(max(1, len(parts) - 1)):
        tail = ".".join(parts[cut:])
        heads = {name.removesuffix(tail) for name in unexpected if name.endswith(tail)}
        alike = sorted((head for head in heads if not head or head.endswith(".")), key=lambda head: (len(head), head))
        yield from ((head, missing[0].removesuffix(tail)) for head in alike[:4])


def _mends(pair: tuple[str, str], missing: Sequence[str], unexpected: Sequence[str]) -> bool:
    theirs, ours = pair
    found = {ours + name.removeprefix(theirs) for name in unexpected if name.startswith(theirs)}
    return found.issuperset(missing)


def _closed(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else f"{prefix}."


def _longest_first(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(pairs, key=lambda pair: (-len(pair[0]), pair[0].count("*"), pair))


def _renamed(name: str, pairs: Sequence[tuple[str, str]]) -> Iterator[str]:
    """What the name becomes by each pair (old prefix, new prefix) that it begins with.

    A pair that `check_prefixes` refuses, as a lineage may have one from before a * meant anything, renames nothing.
    """
    for old, new in pairs:
        if old.count("*") == new.count("*") and (begins := _pattern(old).match(name)):
            yield _filled(new, begins.groups()) + name[begins.end() :]


@lru_cache(maxsize=1024)  # of expert.json too: never one for every expert
def _any_of(globs: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(translate, globs)))


@lru_cache(maxsize=1024)
def _pattern(prefix: str) -> re.Pattern[str]:
    return re.compile("([^.]+)".join(map(re.escape, prefix.split("*"))))


def _filled(prefix: str, parts: Iterable[str]) -> str:
    first, *rest = prefix.split("*")
    return first + "".join(part + text for part, text in zip(parts, rest, strict=True))


def check_prefixes(prefixes: Mapping[str, str]) -> None:
    """Raises ValueError where a * is not a whole part of a name, or a pair has more of them on one side."""
    for pair in prefixes.items():
        torn = next((side for side in pair if any("*" in part and part != "*" for part in side.split("."))), None)
        if torn is not None:
            raise ValueError(f"{json.dumps(torn)}: a * stands for one whole part of a name, between dots")
        if pair[0].count("*") != pair[1].count("*"):
            raise ValueError(f"{json.dumps(pair[0])} and {json.dumps(pair[1])} must have as many * as each other")
