"""Where task vectors come from: a source gives the delta of one tensor at a time, in float32.

A full checkpoint, in one file or in shards, is the difference of its weights and the base's.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from projector.errors import BadSchema, Reason
from projector.files.tensorfile import TensorReader
from projector.method import Factors
from projector.names.buffers import is_fixed, same_buffer
from projector.spec import Schema, TensorSpec
from projector.text import shown

GLANCE_NUMEL = 1 << 10
BLOCK_NUMEL = 1 << 18
WHOLE = "tensors"  # what a content is of: whole tensors, or an adapter's patches


class Source(Protocol):
    """One expert's task vector, read tensor by tensor."""

    order: Sequence[str]  # names of the tensors that are merged, in the order that reads the expert front to back

    def fetch(self, spec: TensorSpec, rows: slice | None) -> Sequence[Tensor]:
        """What the expert has for the tensor `spec`, or for its `rows`, read from the disk."""

    def delta(self, spec: TensorSpec, base: Tensor, fetched: Sequence[Tensor]) -> Tensor:
        """theta - theta_0 in float32, on base's device, from what was fetched there; `base` is that part of theta_0.

        Reads nothing, and may use up `fetched`.
        """

    def own_rows(self, spec: TensorSpec, rows: slice | None) -> int | None:
        """How many of these rows, counted from the first, the expert has itself, where the others are the base's; None
        where it has all of the tensor itself.
        """

    def factors(self, spec: TensorSpec, fetched: Sequence[Tensor]) -> Factors | None:
        """up (m, k) and down (k, n) in float64, with delta = up @ down, where the expert has a matrix in that form.

        For the same part as `fetched`, on its device; asked for before `delta`.
        """

    def sidecars(self, spec: TensorSpec, rows: slice | None) -> Mapping[str, Tensor]:
        """What the expert brought for this tensor or these rows beside its weights, by kind ("fisher", "gram")."""


class Checkpoint:
    """Named tensors in one or more safetensors files; as a Source, the expert that they hold."""

    def __init__(self, files: Iterable[TensorReader], sidecars: Mapping[str, TensorReader] | None = None) -> None:
        self._places: dict[str, _Place] = {}
        for file in files:
            for name in file.specs:
                if name in self._places:
                    raise BadSchema(
                        Reason.BAD_HEADER,
                        f"{shown(name)} is in two files",
                        "save the model again: each tensor belongs in one shard",
                    )
                self._places[name] = _Place(file, name)
        self._beside = {
            kind: {name: _Place(file, name) for name in file.specs} for kind, file in (sidecars or {}).items()
        }
        self._follows: Mapping[str, str] = {}
        self._lent: Collection[str] = ()
        self._twins: Mapping[str, Sequence[str]] | None = None
        self._buffers: Mapping[str, tuple[_Place, _Place]] = {}
        self._schema = _schema(self._places)
        self.order: Sequence[str] = _merged(self.schema)

    @property
    def schema(self) -> Schema:
        """Every tensor, in the order of the files and of the data in them."""
        return self._schema

    @property
    def beside(self) -> Mapping[str, Schema]:
        """The tensors of each sidecar, by kind."""
        return {kind: _schema(places) for kind, places in self._beside.items()}

    def under(
        self,
        own: Mapping[str, str],
        beside: Mapping[str, Mapping[str, str]] = {},
        follows: Mapping[str, str] = {},
        resized: Collection[str] = (),
        lent: Collection[str] = (),
        base: "Checkpoint | None" = None,
    ) -> "Checkpoint":
        """The same files with these tensors only, under other names: the new name -> the name here.

        beside: the same for each sidecar. follows: a tensor -> the one whose sidecars it has where it has none itself.
        resized: those that are to have as many rows as `base` has; what they lack is the base's.
        lent: those that are the base's altogether.
        """
        again = copy(self)
        again._places = {name: self._places[here] for name, here in own.items()}
        if base is not None:
            again._places |= {name: base._places[name] for name in lent}
            again.fit({name: name for name in resized}, base)
        again._beside = {
            kind: {name: self._beside[kind][here] for name, here in names.items()} for kind, names in beside.items()
        }
        again._follows = follows
        again._lent = frozenset(lent)
        again._twins = None
        again._schema = _schema(again._places)
        again.order = _merged(again.schema)
        return again

    @property
    def resized(self) -> Mapping[str, tuple[int, int]]:
        """The tensors that were given the base's rows: how many they have in their file, and how many the base has."""
        return {
            name: (place.file.specs[place.name].shape[0], place.beyond.spec.shape[0])
            for name, place in self._places.items()
            if place.beyond
        }

    def note_buffers(self, own: Mapping[str, str], expert: "Checkpoint", base: "Checkpoint") -> None:
        """Takes note of the tensors that are not merged: the base's name -> that in `expert`."""
        self._buffers = {
            name: (expert._places[theirs], base._places[name])
            for name, theirs in own.items()
            if name in base.schema and base.schema[name].derived and is_fixed(name)
        }

    @property
    def altered(self) -> list[str]:
        """The derived buffers that are others than the base's, by its names: somebody trained or rescaled them. Of
        those that do not float nobody did, and one of another size is of another configuration. Reads them.
        """
        return [name for name, (theirs, ours) in self._buffers.items() if not theirs.same_buffer(ours)]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor `name` or its rows, in the file's dtype."""
        return self._places[name].read(rows)

    def sample(self, name: str, rows: Sequence[int]) -> Tensor:
        """Some rows of a matrix (m, n), (k, n) in float64; the digest passes them by."""
        place = self._places[name]
        n = place.spec.row_numel
        read = b"".join(place.values(torch.float64, row * n, (row + 1) * n) for row in rows)
        return torch.frombuffer(bytearray(read), dtype=torch.float64).reshape(len(rows), n)

    def twins(self) -> Mapping[str, Sequence[str]]:
        """Of each tied weight, the other names that it has.

        Taken for tied are floating matrices (two dimensions or more) of the same shape that have the same values, and
        not one value throughout: two biases, or two matrices of zeros, are alike by chance. The dtype may differ: an
        output layer is at times saved in float32 beside a bfloat16 embedding. Where a
        file's metadata maps one name to another, the two were one tensor when it was written: those are tied whatever
        their shape and values, as long as their bytes are still the same. Looked for once; a few kB are read of each
        matrix, and only those that agree there are read whole, in blocks.
        """
        if self._twins is None:
            floating = _merged(self.schema)
            matrices = {name: self._places[name] for name in floating if len(self.schema[name].shape) > 1}
            same = []
            for alike in _groups(matrices, lambda place: place.spec.shape):
                dtype = _widest(matrices[name].spec.dtype for name in alike)
                for some in _groups({n: matrices[n] for n in alike}, lambda place: place.glance(dtype)):  # noqa: B023
                    same += _groups({n: matrices[n] for n in some}, lambda place: place.digest(dtype))  # noqa: B023
            found = {name for group in same for name in group}
            others = {name: self._places[name] for name in floating if name not in found}
            told = _groups(others, _Place.told)
            same += [group for some in told for group in _groups({n: others[n] for n in some}, _Place.content)]
            self._twins = {name: [twin for twin in group if twin != name] for group in same for name in group}
        return self._twins

    def content(self) -> str:
        """The sha256 that stands for the tensors that are merged, however they are laid out in files; of an expert that
        was matched with the base, by the base's names.

        It is that of a listing, sorted: of each tensor its name, dtype, shape and sha256. Reads what was not hashed.
        """
        return _content(self._merged_places())

    def older_content(self, base: "Checkpoint") -> str | None:
        """`content` as it once was, with the base's derived buffers that float; None where it has none, which is the
        same."""
        derived = {name: base._places[name] for name, spec in base.schema.items() if spec.floating and spec.derived}
        if not derived:
            return None
        return _content(self._merged_places() | derived)

    def _merged_places(self) -> "dict[str, _Place]":
        return {name: place for name, place in self._places.items() if self._schema[name].merged}

    def fit(self, names: Mapping[str, str], base: "Checkpoint") -> None:
        """Gives each of these tensors, by its name -> that in the base, as many rows as the base has."""
        for name, ours in names.items():
            self._places[name] = replace(self._places[name], beyond=base._places[ours])
        self._schema = _schema(self._places)

    def fetch(self, spec: TensorSpec, rows: slice | None) -> Sequence[Tensor]:
        return [self.read(spec.name, rows)]

    def delta(self, spec: TensorSpec, base: Tensor, fetched: Sequence[Tensor]) -> Tensor:
        (theta,) = fetched
        wide = torch.float64 if torch.float64 in (theta.dtype, base.dtype) else torch.float32
        return theta.to(wide).sub_(base.to(wide)).to(torch.float32)  # in mixed dtypes it is four times slower

    def touches(self, name: str) -> bool:
        """False for a tensor that is the base's altogether."""
        return name not in self._lent

    def own_rows(self, spec: TensorSpec, rows: slice | None) -> int | None:
        if spec.name in self._lent:
            return 0
        place = self._places[spec.name]
        if place.beyond is None:
            return None
        return max(0, place.file.specs[place.name].shape[0] - (rows.start if rows else 0))

    def factors(self, spec: TensorSpec, fetched: Sequence[Tensor]) -> Factors | None:
        return None

    def sidecars(self, spec: TensorSpec, rows: slice | None) -> Mapping[str, Tensor]:
        """A sidecar names a tensor as the base does, or its layer: the tensor's name less ".weight".

        One with the tensor's own shape is read in the same rows as the tensor, any other as a whole. Of a tensor that
        is the base's there is nothing to know: its Fisher and its Gram matrix are zero where there is none.
        """
        names = [spec.name, self._follows.get(spec.name, spec.name)]
        found = {}
        for kind, places in self._beside.items():
            known = (place for name in names for place in (name, name.removesuffix(".weight")) if place in places)
            if name := next(known, None):
                place, own = places[name], self._places.get(spec.name)
                if own and own.beyond and own.file.specs[own.name].shape == place.spec.shape > spec.shape:
                    place = replace(place, beyond=own.beyond)  # of a vocabulary with more rows than the base's
                found[kind] = place.read(rows if place.spec.shape == spec.shape else None)
            elif spec.name in self._lent and kind == "fisher":
                found[kind] = torch.zeros(self.read(spec.name, rows).shape)
            elif spec.name in self._lent and kind == "gram" and len(spec.shape) == 2:
                found[kind] = torch.zeros(spec.shape[1], spec.shape[1])
        return found


@dataclass(frozen=True)
class _Place:
    """Where a tensor is, and what it is called there.

    beyond: where the base has it, if it is to have as many rows as there, and those past its own from there.
    """

    file: TensorReader
    name: str
    beyond: "_Place | None" = None

    @property
    def spec(self) -> TensorSpec:
        own = self.file.specs[self.name]
        return replace(own, shape=self.beyond.spec.shape) if self.beyond else own

    def read(self, rows: slice | None) -> Tensor:
        if self.beyond is None:
            return self.file.read(self.name, rows)
        there, wanted = self.file.specs[self.name].shape[0], rows or slice(0, self.spec.shape[0])
        own = self.file.read(self.name, slice(min(wanted.start, there), min(wanted.stop, there)))
        if wanted.stop <= there:
            return own
        return torch.cat([own, self.beyond.read(slice(max(wanted.start, there), wanted.stop))])

    def values(self, dtype: torch.dtype, start: int, end: int) -> bytes:
        """Some of its elements, in that dtype."""
        own = self.spec.dtype
        raw = self.file.glance(self.name, start * own.itemsize, end * own.itemsize)
        if dtype == own or not raw:
            return raw
        return torch.frombuffer(bytearray(raw), dtype=own).to(dtype).view(torch.uint8).numpy().tobytes()

    def same_buffer(self, other: "_Place") -> bool:
        """True where neither floats, or they differ in shape, or hold the same but for rounding; in blocks."""
        if self.spec.shape != other.spec.shape or not (self.spec.floating or other.spec.floating):
            return True
        starts = range(0, self.spec.numel, BLOCK_NUMEL)
        return all(same_buffer(self._block(start), other._block(start)) for start in starts)

    def _block(self, start: int) -> Tensor:
        dtype = self.spec.dtype
        return torch.frombuffer(bytearray(self.values(dtype, start, start + BLOCK_NUMEL)), dtype=dtype)

    def glance(self, dtype: torch.dtype) -> bytes:
        """The digest of its first elements, in that dtype."""
        return hashlib.sha256(self.values(dtype, 0, GLANCE_NUMEL)).digest()

    def digest(self, dtype: torch.dtype) -> bytes | None:
        """The digest of all of it, in that dtype; None where it is one value throughout."""
        digest, constant = hashlib.sha256(), True
        first = self.values(dtype, 0, 1)
        for start in range(0, self.spec.numel, BLOCK_NUMEL):
            block = self.values(dtype, start, start + BLOCK_NUMEL)
            digest.update(block)
            constant = constant and block.count(first) * len(first) == len(block)
        return None if constant else digest.digest()

    def content(self) -> bytes:
        """The same for all that it may hold: of one value throughout, the first bytes say everything."""
        return self.digest(self.spec.dtype) or self.glance(self.spec.dtype)

    def content_entry(self) -> list[object]:
        """Its dtype, shape and sha256: the same for the same tensor in any file."""
        return [str(self.spec.dtype), list(self.spec.shape), self.file.tensor_sha256(self.name)]

    def told(self) -> object:
        """What those tensors have in common that the file's metadata, alias -> name, says were one."""
        return self.file, self.file.header.metadata.get(self.name, self.name), self.spec.shape, self.spec.dtype


def _content(places: Mapping[str, _Place]) -> str:
    return content_of(WHOLE, ([name, *places[name].content_entry()] for name in sorted(places)))


def _groups(places: Mapping[str, _Place], key: Callable[[_Place], object]) -> list[list[str]]:
    """The names by what `key` makes of them, where it makes something of two or more."""
    groups: dict[object, list[str]] = {}
    for name, place in places.items():
        groups.setdefault(key(place), []).append(name)
    return [names for made, names in groups.items() if made is not None and len(names) > 1]


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """One that holds every value of each of them."""
    return reduce(torch.promote_types, dtypes)


def _schema(places: Mapping[str, _Place]) -> Schema:
    return {
        name: place.spec if place.name == name else replace(place.spec, name=name) for name, place in places.items()
    }


def _merged(schema: Schema) -> list[str]:
    return [name for name, spec in schema.items() if spec.merged]


def identity(files: Mapping[str, str]) -> str:
    """An expert's identity from the sha256 of each file that defines it, by name.

    One file: its own sha256, as `sha256sum` prints it. Several: the sha256 of their `sha256sum` listing, sorted by name
    (`sha256sum * | sha256sum` in a folder that holds nothing else).
    """
    if len(files) == 1:
        return next(iter(files.values()))
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(listing.encode()).hexdigest()


def content_of(kind: str, entries: Iterable[object]) -> str:
    """The sha256 of a listing: what it lists, and each entry as a line of JSON."""
    listing = hashlib.sha256(f"{kind}\n".encode())
    for entry in entries:
        listing.update(json.dumps(entry).encode() + b"\n")
    return listing.hexdigest()
