"""The contract of a merging method: a fold over task vectors.

    state = zeros                                              model-sized accumulators, tensor by tensor
    prepared = prepare(state, spec)                            any time before the next expert; may be nothing
    state, sums = update(state + prepared, delta, spec, expert)  once per expert and tensor
    totals = tally(totals, sums over the model, expert)        once per expert
    weights = read(base, state, totals, spec)                  any time

Beside the merged model a method may offer a view of each expert, out of a record that it keeps of each (`keeps`):

    record = keep(delta, spec, expert)                         once per expert and tensor
    sums = view_sums(state, record, spec)                      added up over the model
    weights = view(base, state, record, sums, spec)            any time

A method is a frozen dataclass: its fields are its parameters, declared with `param`, which holds their help and range.
State keys, shapes and dtypes depend on the base tensor's spec alone; arguments are never mutated; the same arguments
give the same bits. `projector.laws` holds any method to this. What is in `__all__` is public: methods of other packages
are made of it, and register themselves under the entry point group `mainstem.methods`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from math import isfinite
from typing import Any, ClassVar, Self, get_type_hints

import torch
from torch import Tensor

from projector.errors import BadParameter, BadSchema, BadValues, Reason
from projector.spec import TensorSpec

__all__ = [
    "BadParameter",
    "BadSchema",
    "BadValues",
    "Contribution",
    "Factors",
    "Method",
    "Reason",
    "Sidecars",
    "State",
    "Sums",
    "Survey",
    "TensorSpec",
    "Totals",
    "idle",
    "param",
]

State = Mapping[str, Tensor]
Sums = Mapping[str, float]
Survey = Mapping[str, Tensor]
Sidecars = Mapping[str, Tensor]
Factors = tuple[Tensor, Tensor]

ACCUMULATOR_DTYPE = torch.float32


@dataclass(frozen=True, slots=True)
class Totals:
    """What a head knows about the whole model: how many experts it has folded, and its method's scalars (float64).

    Part of the state: it must survive a restart exactly.
    """

    experts: int = 0
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def weight(self) -> float:
        """The sum of the experts' weights."""
        return self.scalars.get("weight", float(self.experts))


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a method may know about the arriving expert beside the delta at hand.

    index: its place among the merged experts, from 1. sha256: its identity, known where the method is `keyed`.
    weight: how much it counts, for a method that is `weighted`; negative while a subtractable method takes it out
    again. surveys: the sums over the model of each survey round. sidecars: the tensors it brought for this base
    tensor, by kind ("fisher", "gram"), as listed in the method's `needs`. factors: where an adapter
    brought a matrix (m, n), up (m, k) and down (k, n) in float64 with delta = up @ down; a method that does not take
    the tensor elementwise may work on them instead.
    """

    index: int
    sha256: str = ""
    weight: float = 1.0
    surveys: Sequence[Survey] = ()
    sidecars: Sidecars = field(default_factory=dict)
    factors: Factors | None = None


class Method(ABC):
    """A merging method. Subclasses are frozen dataclasses with a docstring that says what the method does."""

    name: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    order_independent: ClassVar[bool] = False
    subtractable: ClassVar[bool] = False  # folding an expert with minus its weight takes it out again
    weighted: ClassVar[bool] = False  # the formula has a weight for each expert
    keyed: ClassVar[bool] = False  # it must know the expert's sha256, which costs a reading of it beforehand
    approximate: ClassVar[bool] = False  # the fold only approximates the offline method
    rounds: ClassVar[int] = 0  # survey sweeps over the expert before the fold
    surveys_state: ClassVar[bool] = False  # `survey` is given the accumulators too, which are then read in each round
    own_statistics: ClassVar[bool] = False  # it folds running statistics too, which are averaged for all others
    wants_base: ClassVar[bool] = False  # `update` finds the base tensor in its state, as "base"
    wants_depth: ClassVar[bool] = False  # `spec.depth` says in which layer the tensor lies: to survey, update and keep

    @property
    def needs(self) -> tuple[str, ...]:
        """The sidecars that an expert must bring: "fisher", "gram"."""
        return ()

    @property
    def products(self) -> int:
        """Products of a tensor (m, n) with a matrix (n, n) that one `update` or `read` costs at most, beside one
        decomposition of such a matrix: whoever watches takes what lasts far longer for hanging.
        """
        return 4

    @property
    def one_sweep(self) -> bool:
        """True where `tally` says without sums what it will say with them, always or nearly so.

        The merged weights are then written in the sweep that folds the expert, and only where the totals turn out to be
        others in a second one.
        """
        return False

    @property
    def grows(self) -> bool:
        """True where a head that experts are trained from, round after round, gets further from the base than training
        alone would: it adds task vectors up, and each holds what was merged already.
        """
        return False

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """The accumulators of one tensor by key. Default: one, "A", of the tensor's shape, in float32."""
        return {"A": TensorSpec(spec.name, spec.shape, ACCUMULATOR_DTYPE)}

    def elementwise(self, spec: TensorSpec) -> bool:
        """True where the driver may hand over this tensor in blocks of rows; each slot then has the tensor's shape."""
        return False

    def survey(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> Survey:
        """One tensor's share of a survey round; shares are added up, and may be sparse. `expert.surveys` holds the
        rounds before.

        state: the accumulators with `surveys_state`, else nothing.
        """
        raise NotImplementedError(f"{self.name} declares rounds but no survey")

    def prepares(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """What `prepare` makes, at most, of one tensor's accumulators, by key. Default: nothing."""
        return {}

    def prepare(self, state: State, spec: TensorSpec) -> State:
        """What `update` needs of the accumulators alone, as `prepares` lists it.

        It is worked out while nothing arrives and kept on disk; an expert that comes before it is ready waits for it.
        A tensor may have fewer rows than listed, and no others are then kept or read. Only for tensors that are not
        elementwise.
        """
        return {}

    def workspace(self, spec: TensorSpec) -> int:
        """Bytes that `prepare`, `update` and `read` take at their peak beside their arguments and results."""
        return 2 * spec.numel * 4

    @abstractmethod
    def update(self, state: State, delta: Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        """Folds one tensor of one expert and returns its accumulators and sums (float64, added up over the model).

        state: the accumulators, and beside them what `prepare` made of them; with `wants_base` also "base", theta_0 in
        float32 or better. delta: float32, theta - theta_0.
        """

    def tally(self, totals: Totals, sums: Sums, expert: Contribution) -> Totals:
        """Closes one expert: `sums` over all its tensors, and "task_vector", the squared norm of all its deltas.

        Default: counts it, or one less where it is taken out, and adds its weight to the scalar "weight".
        """
        experts = totals.experts + (1 if expert.weight > 0 else -1)
        return Totals(experts, {**totals.scalars, "weight": totals.weight + expert.weight})

    @abstractmethod
    def read(self, base: Tensor, state: State, totals: Totals, spec: TensorSpec) -> Tensor:
        """The merged tensor, in float32 or better. With no expert folded it equals `base`."""

    def keeps(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        """What is kept of one tensor of every expert, by key, so that the disk fills as experts come. Default: nothing.

        Of an elementwise tensor (m, ...) in tensors (m, ...), which the driver hands over in the same blocks of rows.
        """
        return {}

    def keep(self, delta: Tensor, spec: TensorSpec, expert: Contribution) -> State:
        """One tensor's record of the arriving expert, as `keeps` lists it."""
        return {}

    def view_sums(self, state: State, record: State, spec: TensorSpec) -> Sums:
        """One tensor's share of what `view` must know of the whole model (float64)."""
        return {}

    def view(self, base: Tensor, state: State, record: State, sums: Sums, spec: TensorSpec) -> Tensor:
        """One tensor of an expert's own model out of the merged one, in float32 or better. For methods with records."""
        raise NotImplementedError(f"{self.name} keeps no records of experts")

    def second_pass(self, experts: int) -> "Method | None":
        """What makes the result exact once all these experts are folded: folding them again, in the same order, by this
        method, which starts from that state and from empty totals. None where one pass is exact, or nothing is.

        It has the same slots, and reads out the same way.
        """
        return None

    def figures(self, totals: Totals) -> Mapping[str, float]:
        """What to report of a head: lambda, norms, ..., and the sum of the weights where they count."""
        return {key: value for key, value in totals.scalars.items() if key != "weight" or self.weighted}

    def params(self) -> dict[str, Any]:
        """The parameters, ready for JSON: `make(name, method.params())` gives an equal method."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        for f in fields(self):  # type: ignore[arg-type]
            _check(self.name, f.name, getattr(self, f.name), {**f.metadata, "default": f.default})

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """The method with these parameters: JSON values or the strings of a command line. Raises BadParameter."""
        known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
        for key in params:
            if key not in known:
                raise BadParameter(
                    f"{cls.name} has no parameter {key!r}",
                    f"it has {', '.join(sorted(known))}" if known else f"{cls.name} has no parameters",
                )
        hints, about = get_type_hints(cls), method_params(cls)
        return cls(**{key: _parse(cls.name, key, value, hints[key], about[key]) for key, value in params.items()})


def param(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
    idle: float | None = None,
) -> Any:
    """A parameter of a method: its default, what it means, and its closed range or its choices (words).

    idle: the one value in that range at which, by the method's formula, no expert changes anything; it is refused.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices, "idle": idle})


def idle(method: str, key: str, value: float, allowed: str) -> BadParameter:
    """What to raise at a value at which, beside the other parameters, no expert changes anything."""
    return BadParameter(f"{method}.{key} cannot be {value!r}: no expert would change anything", f"allowed: {allowed}")


def param_range(metadata: Mapping[str, Any]) -> str:
    """The allowed values of a parameter in words, "" where anything of its type will do."""
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    words = [*(choices or ())]
    if low is not None and high is not None:
        words.insert(0, f"{low:g} to {high:g}")
    elif low is not None:
        words.insert(0, f"{low:g} or more")
    if metadata["idle"] is not None:
        words[0] += f" but not {metadata['idle']:g}"
    return ", ".join(words)


def method_params(cls: type[Method]) -> dict[str, Mapping[str, Any]]:
    """Each parameter of a method class with help, low, high, choices, idle and default."""
    return {f.name: {**f.metadata, "default": None if f.default is MISSING else f.default} for f in fields(cls)}  # type: ignore[arg-type]


def _check(method: str, key: str, value: Any, metadata: Mapping[str, Any]) -> None:
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if isinstance(value, str):
        good = choices is None or value in choices
    elif isinstance(value, int | float) and not isinstance(value, bool):
        good = isfinite(value) and (low is None or value >= low) and (high is None or value <= high)
    else:
        good = True
    if not good:
        raise BadParameter(f"{method}.{key} cannot be {value!r}", f"allowed: {_allowed(key, metadata)}")
    if metadata["idle"] is not None and value == metadata["idle"]:
        raise idle(method, key, value, _allowed(key, metadata))


def _parse(method: str, key: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """A JSON value or a command line's word as the field's type."""
    wrong = BadParameter(f"{method}.{key} cannot be {value!r}", f"allowed: {_allowed(key, metadata, hint)}")
    if hint == tuple[str, ...]:
        words = value.split(",") if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
            raise wrong
        return tuple(words)
    if hint is bool:
        truths = {"true": True, "false": False, True: True, False: False}
        if not isinstance(value, str | bool) or value not in truths:
            raise wrong
        return truths[value]
    for kind in getattr(hint, "__args__", (hint,)):
        try:
            if kind is int and isinstance(value, float) and not value.is_integer():
                continue
            return kind(value)
        except (TypeError, ValueError, OverflowError):
            continue
    raise wrong


_KINDS = {bool: "true, false", int: "whole numbers", float: "numbers", tuple[str, ...]: "words, separated by commas"}


def _allowed(key: str, metadata: Mapping[str, Any], hint: Any = None) -> str:
    """The values that a parameter takes, in words, with one of them as it is given; hint: its type."""
    words = [word for word in (_KINDS.get(hint), param_range(metadata)) if word]
    default = metadata["default"]
    example = [] if default is None or default is MISSING else [f"for example {key}={worded(default)}"]
    return "; ".join([", ".join(words), *example] if words else example)


def worded(value: Any) -> str:
    """A parameter's value as it is given on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(value) if isinstance(value, list | tuple) else str(value)


def plain(value: Any) -> Any:
    """A parameter's value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value
