"""What a tensor is, without its values: name, shape, dtype; and what a whole checkpoint is: a schema."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from projector.errors import BadSchema, Reason
from projector.text import listed, shown

Schema = Mapping[str, "TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor's name, shape and dtype.

    A large tensor may be handed to an elementwise method in blocks of rows; `shape` is then still the shape of the
    whole tensor and `start` the first row of the block, so that every decision depends on the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

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
    def row_numel(self) -> int:
        """Elements of one row, that is one index of the first dimension; 1 for a scalar."""
        return prod(self.shape[1:])


def check_schema(base: Schema, expert: Schema) -> None:
    """Holds an expert's tensors against the base's: the same names and shapes, floating where the base is.

    The dtype may differ (deltas are taken in float32). Integer and bool buffers come from the base, so an expert may
    leave them out. Raises BadSchema, which names the first tensors that differ.
    """
    missing = [name for name, spec in base.items() if spec.floating and name not in expert]
    unexpected = [name for name in expert if name not in base]
    if missing and len(missing) == sum(spec.floating for spec in base.values()):
        raise BadSchema(
            Reason.WRONG_BASE,
            f"none of the base's tensors is there; it has {listed(expert) or 'no tensor at all'}",
            "this is another architecture, or its names carry a prefix: save it with the names of the base",
        )
    if missing:
        raise BadSchema(
            Reason.MISSING_TENSOR,
            f"{len(missing)} of the base's tensors are missing: {listed(missing)}",
            "save the whole model, with the names of the base",
        )
    if unexpected:
        raise BadSchema(
            Reason.UNEXPECTED_TENSOR,
            f"{len(unexpected)} tensors are not the base's: {listed(unexpected)}",
            "leave out what the base has not, such as a task's own head",
        )
    for name, spec in expert.items():
        _check_tensor(base[name], spec)


def check_sidecar(base: Schema, kind: str, sidecar: Schema) -> None:
    """Holds the header of a sidecar ("fisher", "gram") against the base's tensors.

    Each of its tensors floats and bears the name of a floating tensor of the base, or of a layer: such a name less
    ".weight". Shapes are the method's to check. Raises BadSchema.
    """
    floating = {name for name, spec in base.items() if spec.floating}
    known = floating | {name.removesuffix(".weight") for name in floating}
    unknown = [name for name in sidecar if name not in known]
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
        transposed = expert.shape == base.shape[::-1]
        raise BadSchema(
            Reason.WRONG_SHAPE,
            f"{shown(base.name)} has shape {list(expert.shape)}, the base {list(base.shape)}",
            "it is the transpose: save it as the base has it"
            if transposed
            else "fine-tune from this home's base; a resized vocabulary cannot be merged",
        )
    if expert.floating != base.floating:
        raise BadSchema(
            Reason.UNSUPPORTED_DTYPE,
            f"{shown(base.name)} is {expert.dtype}, the base {base.dtype}".replace("torch.", ""),
            "save it as float32, float16 or bfloat16; quantised weights cannot be merged",
        )
