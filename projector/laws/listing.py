"""What can be said of a method before it is chosen, read from its code: for `mainstem methods` and docs/methods.md."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from projector.errors import BadParameter
from projector.method import Method, method_params, param_range, plain, worded
from projector.spec import TensorSpec

TALL = (1024, 512)  # m x n, so that each side of an accumulator can be told by its length
WIDE = (512, 1024)
SQUARE = (1024, 1024)
VECTOR = (1024,)


@dataclass(frozen=True)
class Parameter:
    """A parameter's default, its meaning, and its allowed values in words ("" where any of its type will do)."""

    default: Any
    help: str
    range: str


@dataclass(frozen=True)
class Listing:
    """A method with its default parameters, and under `depends` which parameters change which of these facts.

    keeps, prepares: accumulators of a matrix of m rows and n columns by their key, in words ("m x n float32"); k is the
    smaller of both. What is prepared is derived from them while nothing arrives. bytes_per_parameter: of the
    accumulators of a square matrix of 1024 x 1024, and vector_bytes_per_parameter of a vector, over a float32 base.
    record_bytes_per_parameter, vector_record_bytes_per_parameter: what is kept of every single expert beside that, of
    the same matrix and of a vector; 0 but for methods that grow with them.
    reads: how often an expert is read, where it feeds this head alone.
    """

    name: str
    summary: str
    formula: str
    paper: str
    parameters: Mapping[str, Parameter]
    keeps: Mapping[str, str]
    prepares: Mapping[str, str]
    bytes_per_parameter: float
    vector_bytes_per_parameter: float
    record_bytes_per_parameter: float
    vector_record_bytes_per_parameter: float
    order_independent: bool
    subtractable: bool
    weighted: bool
    needs: Sequence[str]
    approximate: bool
    reads: int
    depends: Mapping[str, Sequence[str]]


def listing(cls: type[Method]) -> Listing:
    """Everything that is listed of one method."""
    facts = _facts(cls())
    changed: dict[str, set[str]] = {}
    for before, parameter, after in _changes(cls):
        old = _facts(before)
        for fact, value in _facts(after).items():
            if value != old[fact]:
                changed.setdefault(fact, set()).add(parameter)
    return Listing(
        name=cls.name,
        summary=" ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split()),
        formula=cls.formula,
        paper=cls.paper,
        parameters={
            key: Parameter(plain(about["default"]), about["help"], _range(about))
            for key, about in method_params(cls).items()
        },
        **facts,
        depends={fact: sorted(parameters) for fact, parameters in changed.items()},
    )


def lines(listed: Listing) -> Iterator[tuple[str, str]]:
    """The facts in words, as (what, answer), for people."""

    def answer(words: str, *facts: str) -> str:
        parameters = sorted({parameter for fact in facts for parameter in listed.depends.get(fact, ())})
        return f"{words} (depends on {', '.join(parameters)})" if parameters else words

    kept = f"{_amount(listed)}: {_accumulators(listed.keeps)}" if listed.keeps else "nothing"
    yield "keeps", answer(kept, "keeps", "vector_bytes_per_parameter")
    if listed.prepares:
        yield "prepares", answer(_accumulators(listed.prepares), "prepares")
    if listed.record_bytes_per_parameter:
        matrix, vector = listed.record_bytes_per_parameter, listed.vector_record_bytes_per_parameter
        yield "keeps of each expert", f"{_each(matrix, vector, '.2g')}: it grows with them"
    yield "order of experts", answer("does not matter" if listed.order_independent else "matters", "order_independent")
    yield "taking an expert out", answer("exact, by subtraction" if listed.subtractable else "replay", "subtractable")
    yield "weights of experts", answer("counted" if listed.weighted else "ignored", "weighted")
    needs = ", ".join(f"{need}.safetensors" for need in listed.needs)
    yield "an expert must bring", answer(needs or "nothing but its weights", "needs")
    yield "result", answer("approximate" if listed.approximate else "exact", "approximate")
    yield "reads an expert", answer({1: "once", 2: "twice"}.get(listed.reads, f"{listed.reads} times"), "reads")


def markdown(listings: Iterable[Listing]) -> str:
    """The generated part of docs/methods.md: a table of all methods, then each with its formula and parameters."""
    every = list(listings)
    parts = ["| method | bytes | order | taking out | weights | needs | reads |", "|---|---|---|---|---|---|---|"]
    parts += [
        f"| [`{one.name}`](#{one.name}) | {one.bytes_per_parameter:.3g}{_by(one, 'bytes_per_parameter')} "
        f"| {_yes(one, 'order_independent', 'free', 'matters')} "
        f"| {_yes(one, 'subtractable', 'exact', 'replay')} | {_yes(one, 'weighted', 'yes', 'no')} "
        f"| {', '.join(one.needs) or '-'}{_by(one, 'needs')} | {one.reads}{_by(one, 'reads')} |"
        for one in every
    ]
    for one in every:
        parts += ["", f"### {one.name}", "", _escaped(one.summary), "", f"    {one.formula}", ""]
        parts += [f"{_escaped(one.paper)}.{_more(one)}"]
        if one.parameters:
            parts += [""]
            parts += [
                f"- `{key}={worded(about.default)}`{_choices(about)}: {_escaped(about.help)}"
                for key, about in one.parameters.items()
            ]
    return "\n".join(parts) + "\n"


def _range(about: Mapping[str, Any]) -> str:
    return "true, false" if isinstance(about["default"], bool) else param_range(about)


def _facts(method: Method) -> dict[str, Any]:
    return {
        "keeps": _shapes(method, "slots"),
        "prepares": _shapes(method, "prepares"),
        "bytes_per_parameter": _bytes(method, SQUARE),
        "vector_bytes_per_parameter": _bytes(method, VECTOR),
        "record_bytes_per_parameter": _bytes(method, SQUARE, "keeps"),
        "vector_record_bytes_per_parameter": _bytes(method, VECTOR, "keeps"),
        "order_independent": method.order_independent,
        "subtractable": method.subtractable,
        "weighted": method.weighted,
        "needs": list(method.needs),
        "approximate": method.approximate,
        "reads": 1 + method.rounds + method.keyed,
    }


def _changes(cls: type[Method]) -> Iterator[tuple[Method, str, Method]]:
    """A method before and after one parameter is changed, from the defaults and from each choice of another parameter:
    some parameters only matter beside a certain choice."""
    starts = [cls(), *(varied for _, _, varied in _variants(cls(), words=True))]
    for start in starts:
        yield from _variants(start)


def _variants(start: Method, words: bool = False) -> Iterator[tuple[Method, str, Method]]:
    """One parameter at a time at each of its choices and, unless only words are asked for, at the ends of its range."""
    for key, about in method_params(type(start)).items():
        truths = (True, False) if isinstance(about["default"], bool) else ()
        ends = () if words else (about["low"], about["high"])
        for value in (*(about["choices"] or ()), *truths, *ends):
            try:
                if value is not None:
                    yield start, key, type(start).from_params({**start.params(), key: value})
            except BadParameter:  # not beside the others' values
                continue


def _shapes(method: Method, what: str) -> dict[str, str]:
    """The tensors by key that a method keeps or prepares of a matrix, in words."""
    tall, wide = (getattr(method, what)(_spec(shape)) for shape in (TALL, WIDE))
    return {key: _shape(slot, wide.get(key, slot)) for key, slot in tall.items()}


def _shape(tall: TensorSpec, wide: TensorSpec) -> str:
    """ "m x n float32": a side as long as the rows of the tall and of the wide matrix is m, of the columns n, of the
    shorter side k; "m k" is one as long as a matrix m x k, flattened."""
    letters = {(TALL[0], WIDE[0]): "m", (TALL[1], WIDE[1]): "n", (TALL[1], WIDE[0]): "k", (TALL[0], WIDE[1]): "l"}
    pairs = list(combinations(list(letters.items())[:3], 2))
    letters |= {(a[0] * b[0], a[1] * b[1]): f"{one} {other}" for (a, one), (b, other) in pairs}
    sides = zip(tall.shape, wide.shape, strict=True)
    shape = " x ".join(letters.get(pair, str(pair[0])) for pair in sides)
    return f"{shape or 'one'} {tall.dtype}".replace("torch.", "")


def _bytes(method: Method, shape: tuple[int, ...], what: str = "slots") -> float:
    spec = _spec(shape)
    slots: Mapping[str, TensorSpec] = getattr(method, what)(spec)
    return sum(slot.nbytes for slot in slots.values()) / spec.numel


def _spec(shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec("layer.weight", shape, torch.float32)


def _amount(listed: Listing) -> str:
    return _each(listed.bytes_per_parameter, listed.vector_bytes_per_parameter, ".3g")


def _each(matrix: float, vector: float, digits: str) -> str:
    other = "" if matrix == vector else f" of a square matrix, {vector:{digits}} of a vector"
    return f"{matrix:{digits}} bytes per parameter{other}"


def _accumulators(shapes: Mapping[str, str]) -> str:
    keys: dict[str, list[str]] = {}
    for key, shape in shapes.items():
        keys.setdefault(shape, []).append(key)
    return "; ".join(f"{', '.join(alike)} {shape}" for shape, alike in keys.items())


def _more(listed: Listing) -> str:
    """What few methods have: an amount that is kept of each expert, a result that is not the method's own."""
    matrix, vector = listed.record_bytes_per_parameter, listed.vector_record_bytes_per_parameter
    more = f" Keeps of each expert {_each(matrix, vector, '.2g')}." if matrix else ""
    return more + (" **Approximate.**" if listed.approximate else "")


def _choices(about: Parameter) -> str:
    """The allowed words, in brackets; numbers are told by `mainstem methods` and by every refusal."""
    words = [word for word in about.range.split(", ") if word[:1].isalpha()]
    return f" ({_escaped(', '.join(words))})" if words else ""


def _yes(listed: Listing, fact: str, true: str, false: str) -> str:
    return (true if getattr(listed, fact) else false) + _by(listed, fact)


def _by(listed: Listing, fact: str) -> str:
    """The parameters that change a fact, in brackets."""
    parameters = listed.depends.get(fact)
    return f" ({_escaped(', '.join(parameters))})" if parameters else ""


def _escaped(words: str) -> str:
    return words.replace("*", "\\*").replace("_", "\\_").replace("<", "\\<")
