"""Where task vectors come from: a source gives the delta of one tensor at a time, in float32.

A full checkpoint, in one file or in shards, is the difference of its weights and the base's.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from projector.errors import BadSchema, Reason
from projector.spec import Schema, TensorSpec
from projector.tensorfile import TensorReader
from projector.text import shown


class Source(Protocol):
    """One expert's task vector, read tensor by tensor."""

    order: Sequence[str]  # names of the floating tensors, in the order that reads the expert front to back

    def fetch(self, spec: TensorSpec, rows: slice | None) -> Sequence[Tensor]:
        """What the expert has for the tensor `spec`, or for its `rows`, read from the disk."""

    def delta(self, spec: TensorSpec, base: Tensor, fetched: Sequence[Tensor]) -> Tensor:
        """theta - theta_0 in float32, on base's device, from what was fetched there; `base` is that part of theta_0.

        Reads nothing, and may use up `fetched`.
        """

    def sidecars(self, spec: TensorSpec, rows: slice | None) -> Mapping[str, Tensor]:
        """What the expert brought for this tensor or these rows beside its weights, by kind ("fisher", "gram")."""


class Checkpoint:
    """Named tensors in one or more safetensors files; as a Source, the expert that they hold."""

    def __init__(self, files: Iterable[TensorReader], sidecars: Mapping[str, TensorReader] | None = None) -> None:
        self._sidecars = sidecars or {}
        self._reader: dict[str, TensorReader] = {}
        for file in files:
            for name in file.specs:
                if name in self._reader:
                    raise BadSchema(
                        Reason.BAD_HEADER,
                        f"{shown(name)} is in two files",
                        "save the model again: each tensor belongs in one shard",
                    )
                self._reader[name] = file
        self.order: Sequence[str] = [name for name, spec in self.schema.items() if spec.floating]

    @property
    def schema(self) -> Schema:
        """Every tensor, in the order of the files and of the data in them."""
        return {name: file.specs[name] for name, file in self._reader.items()}

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor `name` or its rows, in the file's dtype."""
        return self._reader[name].read(name, rows)

    def fetch(self, spec: TensorSpec, rows: slice | None) -> Sequence[Tensor]:
        return [self.read(spec.name, rows)]

    def delta(self, spec: TensorSpec, base: Tensor, fetched: Sequence[Tensor]) -> Tensor:
        (theta,) = fetched
        wide = torch.float64 if torch.float64 in (theta.dtype, base.dtype) else torch.float32
        return theta.to(wide).sub_(base.to(wide)).to(torch.float32)  # in mixed dtypes it is four times slower

    def sidecars(self, spec: TensorSpec, rows: slice | None) -> Mapping[str, Tensor]:
        """A sidecar names a tensor as the base does, or its layer: the tensor's name less ".weight".

        One with the tensor's own shape is read in the same rows as the tensor, any other as a whole.
        """
        layer = spec.name.removesuffix(".weight")
        found = {
            kind: next((name for name in (spec.name, layer) if name in file.specs), None)
            for kind, file in self._sidecars.items()
        }
        return {
            kind: file.read(name, rows if file.specs[name].shape == spec.shape else None)
            for kind, name in found.items()
            if name is not None and (file := self._sidecars[kind])
        }


def identity(files: Mapping[str, str]) -> str:
    """An expert's identity from the sha256 of each file that defines it, by name.

    One file: its own sha256, as `sha256sum` prints it. Several: the sha256 of their `sha256sum` listing, sorted by name
    (`sha256sum * | sha256sum` in a folder that holds nothing else).
    """
    if len(files) == 1:
        return next(iter(files.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()
