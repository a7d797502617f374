"""What an adapter's names need to become the base's, where there is one way alone: see projector/matching/fitting.py.

An adapter touches a part of the base only, so all that it touches has to fit, by name and by shape.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from projector.lora.keys import FULL, A, B, is_embedding, tensor_parts
from projector.matching.fitting import COUNTED, RENAMED
from projector.matching.task_heads import (
    LAYER,
    check_none_lost,
    common_parts,
    counterparts,
    ends_with,
    is_head,
    own_heads,
)
from projector.names.naming import Naming
from projector.spec import Schema, sole_twins

Shape = tuple[int, ...]


def fitted_adapter(naming: Naming, adapter: Schema, base: Schema, *, tied: bool) -> Naming:
    """The naming by which the adapter is to be read: with what makes it fit, as far as `naming` is lenient.

    tied: as for `fitted`. Takes a time that grows with the number of tensors.
    """
    if not naming.lenient:
        return naming
    known = tensor_parts(adapter)
    shapes = {name: _shape(parts, adapter) for name, parts in known.items()}
    unknown = _unknown(naming, shapes, base)
    body = {name: shape for name, shape in unknown.items() if not (FULL in known[name] and is_head(name))}
    if body:
        naming = _renamed(naming, body, base)
        unknown = _unknown(naming, shapes, base)
    whole = {name: shape for name, shape in unknown.items() if known[name].keys() == {FULL}}
    if pairs := counterparts(naming.parts, whole, _untouched(naming, shapes, base)):
        naming = replace(naming, prefixes={**naming.prefixes, **pairs})
        unknown = _unknown(naming, shapes, base)
    specs = [replace(adapter[known[name][FULL]], name=name) for name in unknown if name in whole]
    output = dict(sole_twins(base, specs)) if tied else {}
    extra = {name: shape for name, shape in unknown.items() if name not in output}
    used = [name for name in shapes if name not in unknown]
    heads = own_heads(list(extra), used) if whole.keys() >= extra.keys() else []
    if heads:
        inner = {spec.shape for name, spec in base.items() if LAYER.search(name)}
        check_none_lost(extra, _untouched(naming, shapes, base), inner, (), used)
    return replace(naming, ignore=(*naming.ignore, *heads))


def _untouched(naming: Naming, shapes: Mapping[str, Shape], base: Schema) -> dict[str, Shape]:
    """The heads of the base that the adapter leaves as they are."""
    touched = set(naming.resolve(shapes, base).values())
    return {name: spec.shape for name, spec in base.items() if is_head(name) and spec.merged and name not in touched}


def _shape(parts: Mapping[str, str], adapter: Schema) -> Shape:
    """The shape of the model's tensor by these parts of the adapter; () where they do not say."""
    if FULL in parts:
        return adapter[parts[FULL]].shape
    if A not in parts or B not in parts:
        return ()
    a, b = adapter[parts[A]].shape, adapter[parts[B]].shape
    shape = (b[0], *a[1:]) if a and b else ()
    return shape[::-1] if is_embedding(parts) else shape


def _unknown(naming: Naming, shapes: Mapping[str, Shape], base: Schema) -> dict[str, Shape]:
    return {name: shapes[name] for name, ours in naming.resolve(shapes, base).items() if ours not in base}


def _renamed(naming: Naming, body: Mapping[str, Shape], base: Schema) -> Naming:
    """With the one prefix, or the known renaming, by which the base has all of these, in these shapes."""
    found = {pair for pair in _pairs(body, base) if _fits(dict([pair]), body, base)}
    wanted = [dict([pair]) for pair in found]
    if len(wanted) != 1:  # what the library did says which of several is meant
        wanted = [dict(table) for table in RENAMED if _fits(table, body, base)]
    return replace(naming, prefixes={**naming.prefixes, **wanted[0]}) if len(wanted) == 1 else naming


def _fits(prefixes: Mapping[str, str], body: Mapping[str, Shape], base: Schema) -> bool:
    made = Naming(prefixes).resolve(body, base)
    return all(
        ours in base and (not body[name] or sorted(body[name]) == sorted(base[ours].shape))
        for name, ours in made.items()
    )


def _pairs(body: Mapping[str, Shape], base: Schema) -> Iterator[tuple[str, str]]:
    """What could stand for what all of these begin with; no other layer, and no module that has a "weight" too."""
    probe = min(body, key=lambda name: (-name.count("."), name))
    parts = probe.split(".")
    for cut in range(min(common_parts(body), max(0, len(parts) - 2)) + 1):
        theirs = "".join(f"{part}." for part in parts[:cut])
        tail = probe.removeprefix(theirs)
        longer = f"{parts[cut - 1]}.{tail}" if cut else None
        for name in base:
            ours = name.removesuffix(tail)
            if ends_with(name, tail) and not (longer and ends_with(name, longer)) and ours != theirs:
                akin = theirs.endswith(ours) or ours.endswith(theirs) or COUNTED.search(tail)
                if akin and not COUNTED.search(theirs) and not COUNTED.search(ours):
                    yield theirs, ours
