"""What a tensor is, without its values: name, shape, dtype; and what a whole checkpoint is: a schema."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from projector.errors import BadSchema, Reason
from projector.names.buffers import is_derived, is_statistic
from projector.names.naming import SAME, globs, in_about, layers_beyond, mended, mending, more_layers
from projector.names.quantised import BEFORE, check_not_quantised
from projector.text import FOLDER, OUT, listed, shown

Schema = Mapping[str, "TensorSpec"]

UNGATHERED = (
    f"its weights were not gathered before they were saved (ZeRO-3, FSDP): `python zero_to_fp32.py . {OUT}"
    " --safe_serialization`, in the folder of DeepSpeed's checkpoint, which has that script, and drop what it makes;"
    " or save again with stage3_gather_16bit_weights_on_model_save; where whole shards lie beside it, drop them without"
    " this file"
)

ONE_BY_ONE = re.compile(r"(^|\.)experts\.\d+\.")
FUSED = re.compile(r"(^|\.)experts\.(gate_up_proj|gate_proj|up_proj|down_proj)$")
LOADED = f'AutoModelForCausalLM.from_pretrained("{FOLDER}")'
UNFUSE = (
    f"the experts of its mixture are fused, the base's stand one by one: with transformers, model = {LOADED};"
    " again = AutoModelForCausalLM.from_config(model.config); again.load_state_dict(model.state_dict());"
    f' again.save_pretrained("{OUT}"), and drop that'
)
FUSE = (
    "the experts of its mixture stand one by one, the base's are fused: with transformers,"
    f' safetensors.torch.save_model({LOADED}, "{OUT}.safetensors"), and drop that'
)

LEAST_ROWS = 16  # among fewer, rows that mean something else would be taken for the same ones by chance
OTHER_ROWS = (
    f"more or fewer rows are merged as far as both have them, but only where {LEAST_ROWS} or more are seen to be the"
    " same ones, as tokens are: fine-tune from this home's base, with its vocabulary and its labels"
)


FROM_BASE = "fine-tune from this home's base"
OTHER_MODEL = (
    "it is of another architecture or size, which no prefix mends: it needs a home over its own base (`mainstem init`"
    " with --base); a model that comes from this home's base is to be saved in the layout of the base"
)

NEVER_TIED = re.compile(r"token_type|segment|position|wpe|modality|lang_embed|language_embed")
"""Embeddings of few rows, as many as a classifier may have labels."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor's name, shape and dtype.

    A large tensor may be handed to an elementwise method in blocks of rows; `shape` is then still the shape of the
    whole tensor and `start` the first row of the block, so that every decision depends on the whole tensor.

    depth: for a method that wants it, how far down its list of layers it lies, from 0 to 1; None outside of any.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0
    depth: float | None = field(default=None, compare=False)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    @property
    def floating(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def derived(self) -> bool:
        """True for a buffer that follows from the configuration, such as rotary frequencies or a causal mask."""
        return is_derived(self.name, self.shape)

    @property
    def merged(self) -> bool:
        """True where experts are merged in it: it floats, and is not derived. All else is the base's."""
        return self.dtype.is_floating_point and not self.derived

    @property
    def vector(self) -> bool:
        """True where at most one dimension is longer than 1, as of a bias and of the weights of a norm."""
        return sum(size > 1 for size in self.shape) < 2

    @property
    def statistic(self) -> bool:
        """True for the running statistics of a layer's inputs, which every method averages."""
        return is_statistic(self.name)

    @property
    def row_numel(self) -> int:
        """Elements of one row, that is one index of the first dimension; 1 for a scalar."""
        return prod(self.shape[1:])


def check_schema(base: Schema, expert: Schema, theirs: Mapping[str, str] = {}) -> None:
    """Holds an expert's tensors against the base's: the same names and shapes, floating where the base is.

    theirs: what the expert calls a tensor, by its name here, where that is another.

    The dtype may differ (deltas are taken in float32). Integer, bool and derived buffers come from the base: an expert
    may leave them out, and may bring some that the base has not. Raises BadSchema, which names the first tensors that
    differ.
    """
    missing = [name for name, spec in base.items() if spec.merged and name not in expert]
    unexpected = [name for name, spec in expert.items() if name not in base and spec.merged]
    check_not_quantised(name for name in expert if name not in base)
    if not expert:
        raise BadSchema(Reason.MISSING_TENSOR, "there is no tensor in it", UNGATHERED)
    known = [name for name in expert if name in base]
    other = OTHER_MODEL if (missing or unexpected) and not akin(base, expert) else None
    named = [theirs.get(name, name) for name in known]
    more = more_layers(missing, unexpected, named)
    other = other or (f"it has more layers than the base ({listed(more)}): {OTHER_MODEL}" if more else None)
    mend = _mend(missing, unexpected, named)
    if missing and len(missing) == sum(spec.merged for spec in base.values()):
        raise BadSchema(
            Reason.WRONG_BASE,
            f"none of the base's tensors is there; it has {listed(expert)}",
            other
            or mend
            or "if these are the base's tensors under other names, save it with the names of the base"
            f"{_strange(unexpected)}; if not, {OTHER_MODEL}",
        )
    if missing:
        raise BadSchema(
            Reason.MISSING_TENSOR,
            f"{len(missing)} of the base's tensors are missing: {listed(missing)}",
            _other_layout(missing, unexpected)
            or other
            or mend
            or _other_name(base, expert, missing, unexpected)
            or "save the whole model, with the names of the base, as save_pretrained does"
            + (_strange(unexpected) or _left(missing, known))
            + (f"; or {UNGATHERED}" if len(missing) > len(expert) else ""),
        )
    for untied, twin in sole_twins(base, [expert[name] for name in unexpected]):
        raise BadSchema(
            Reason.UNEXPECTED_TENSOR,
            f"{shown(untied)} is not the base's, and differs from the expert's own {shown(twin)}",
            "a weight that the base ties was trained on its own here, which makes it another model: train with it tied"
            " (tie_word_embeddings), or leave it out of the file if what it learnt may be lost",
        )
    if unexpected:
        raise BadSchema(
            Reason.UNEXPECTED_TENSOR,
            f"{len(unexpected)} tensors are not the base's: {listed(unexpected)}",
            other
            or "leave out what the base has not, such as a task's own head; a second copy of a tied weight must equal"
            f" the first{f'; or {mend}' if mend else ''}",
        )
    empty = [name for name, spec in expert.items() if name in base and base[name].numel and not spec.numel]
    if any(base[name].merged for name in empty):
        raise BadSchema(Reason.WRONG_SHAPE, f"{len(empty)} tensors are empty: {listed(empty)}", UNGATHERED)
    for name, spec in expert.items():
        if name in base and not base[name].derived:
            try:
                _check_tensor(base[name], spec)
            except BadSchema as error:
                if error.hint == FROM_BASE and not akin(base, expert):
                    error.hint = OTHER_MODEL
                raise


def akin(base: Schema, expert: Schema) -> bool:
    """False where most matrices of either have no counterpart in the other: of its name and shape, else of its shape.

    However its tensors are called, an expert is then of another model: of another architecture, or of another size. A
    shape may be turned round.
    """
    ours, theirs = (
        {name: tuple(sorted(spec.shape)) for name, spec in schema.items() if spec.merged and not spec.vector}
        for schema in (base, expert)
    )
    named = [name for name, shape in ours.items() if theirs.get(name) == shape]
    left = Counter(shape for name, shape in ours.items() if name not in theirs)
    again = Counter(shape for name, shape in theirs.items() if name not in ours)
    common = len(named) + (left & again).total()
    return 2 * common >= min(len(ours), len(theirs))


def _mend(missing: Sequence[str], unexpected: Sequence[str], known: Sequence[str]) -> str | None:
    """What to set, or to say in expert.json, if one prefix and a few globs mend it."""
    words = mending(missing, unexpected, known)
    naming = mended(missing, unexpected, known) if words else SAME
    told = in_about(prefixes=dict(naming.prefixes), ignore=list(naming.ignore))
    return words and f"put {words} under [admission] in mainstem.toml{told and f', or drop it with {told}'}"


def _left(missing: Sequence[str], known: Sequence[str]) -> str:
    """What else to do where the base's are simply not there."""
    if last := _last_layers(missing, known):
        return f"; with fewer layers than the base (without {listed(last)}) it is another model"
    told = in_about(unchanged=globs(missing, known)) if known else None
    return f"; or, if it leaves these as they are, drop it with {told}" if told else ""


def _last_layers(missing: Sequence[str], known: Sequence[str]) -> list[str]:
    """The layers that are missing behind all of their list that are there."""
    there: dict[str, int] = {}
    for name in known:
        parts = name.split(".")
        for place, part in enumerate(parts):
            if part.isdecimal():
                within = ".".join(parts[:place])
                there[within] = max(there.get(within, 0), int(part))
    lists = ((module, *module.rpartition(".")[::2]) for module in layers_beyond(missing, known))
    return [module for module, within, number in lists if int(number) > there[within]]


def _strange(unexpected: Sequence[str]) -> str:
    """What else to do where tensors with other names are there."""
    if not unexpected:
        return ""
    return f"; or say in admission.prefixes what such names as {shown(unexpected[0])} are in the base (docs/experts.md)"


def _other_name(base: Schema, expert: Schema, missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """What to do where all that is missing may be there under the other name of a tied weight."""
    alike = [name for name in unexpected if expert[name].shape == base[missing[0]].shape]
    if len(missing) > 1 or len(alike) != 1 or len(base[missing[0]].shape) != 2:
        return None
    return f"if {shown(alike[0])} is that weight, tied, under its other name: save it as {shown(missing[0])}"


def _other_layout(missing: Iterable[str], unexpected: Iterable[str]) -> str | None:
    """What to do where a mixture's experts are stacked in one of the two, and stand one by one in the other."""
    for ours, theirs, hint in ((ONE_BY_ONE, FUSED, UNFUSE), (FUSED, ONE_BY_ONE, FUSE)):
        if any(map(ours.search, missing)) and any(map(theirs.search, unexpected)):
            return hint
    return None


def sole_twins(base: Schema, unexpected: Iterable[TensorSpec]) -> Iterator[tuple[str, str]]:
    """Those that have the shape of just one matrix of the base, each with its name: as an output layer has that of the
    embedding. A task's own head shares its shape with none, or with many layers, above all where it is square; or with
    an embedding of positions or token types, which no output layer is tied to."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name, other in base.items():
        if not NEVER_TIED.search(name):
            alike.setdefault(other.shape, []).append(name)
    for spec in unexpected:
        twins = alike.get(spec.shape, [])
        if len(twins) == 1 and len(spec.shape) == 2 and spec.shape[0] != spec.shape[1]:
            yield spec.name, twins[0]


def check_base(base: Schema) -> None:
    """Raises BadSchema where the base's weights are quantised: what does not float is never merged."""
    whole = [name for name, spec in base.items() if not spec.floating]
    check_not_quantised(whole)
    weights = [name for name in whole if name.endswith(".weight") and len(base[name].shape) > 1]
    if weights:
        raise BadSchema(
            Reason.UNSUPPORTED_DTYPE,
            f"{shown(weights[0])} is {base[weights[0]].dtype}".replace("torch.", ""),
            BEFORE,
        )


def check_sidecar(base: Schema, kind: str, sidecar: Schema) -> None:
    """Holds the header of a sidecar ("fisher", "gram") against the base's tensors.

    Each of its tensors floats and bears the name of a floating tensor of the base, or of a layer: such a name less
    ".weight". Shapes are the method's to check. Raises BadSchema.
    """
    floating = {name for name, spec in base.items() if spec.floating}
    known = floating | {name.removesuffix(".weight") for name in floating}
    unknown = [name for name, spec in sidecar.items() if name not in known and (name in base or not spec.derived)]
    if unknown:
        raise BadSchema(
            Reason.BAD_SIDECAR,
            f"{kind}.safetensors has {len(unknown)} names that are not the base's: {listed(unknown)}",
            'name each tensor as the weights do, or its layer: that name less ".weight"',
        )
    whole = [name for name, spec in sidecar.items() if not spec.floating]
    if whole:
        raise BadSchema(
            Reason.BAD_SIDECAR,
            f"{kind}.safetensors has {len(whole)} tensors of whole numbers: {listed(whole)}",
            "save them as float32, or as float64",
        )


def _check_tensor(base: TensorSpec, expert: TensorSpec) -> None:
    if expert.shape != base.shape:
        raise BadSchema(
            Reason.WRONG_SHAPE,
            f"{shown(base.name)} has shape {list(expert.shape)}, the base {list(base.shape)}",
            _shape_hint(base.shape, expert.shape),
        )
    if expert.floating != base.floating:
        raise BadSchema(
            Reason.UNSUPPORTED_DTYPE,
            f"{shown(base.name)} is {expert.dtype}, the base {base.dtype}".replace("torch.", ""),
            f"save it as float32, float16 or bfloat16; {BEFORE}"
            if base.floating
            else f"save it as {base.dtype}, or leave it out: what does not float is the base's".replace("torch.", ""),
        )


def resized_rows(base: tuple[int, ...], expert: tuple[int, ...]) -> bool:
    """True for two matrices that differ in their rows alone, as where a vocabulary was resized."""
    return len(base) == len(expert) == 2 and base[1] == expert[1]


def _shape_hint(base: tuple[int, ...], expert: tuple[int, ...]) -> str:
    if len(base) > 1 and expert == base[::-1]:
        return "it is the transpose: save it as the base has it"
    if len(expert) == 1 < len(base):
        return f"it is flattened, and it may be a part of it: {UNGATHERED}"
    if resized_rows(base, expert):
        return OTHER_ROWS
    return FROM_BASE
