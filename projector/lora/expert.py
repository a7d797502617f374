"""A PEFT LoRA adapter as a source of task vectors: the delta of one tensor at a time, from its parts.

What an adapter does not touch costs nothing to read, and a full expert is never built.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from projector.algebra.linalg import one_thread, row_blocks
from projector.errors import BadSchema
from projector.files.source import Checkpoint, content_of
from projector.files.tensorfile import TensorReader
from projector.lora.config import LoraConfig
from projector.lora.delta import Parts, Patch, delta_of, factors_of, squared_columns
from projector.lora.keys import FULL, tensor_parts
from projector.lora.plan import ALONE, patches_of
from projector.matching.resized import common_rows
from projector.method import Factors
from projector.names.naming import SAME, Naming
from projector.names.quantised import check_not_quantised
from projector.spec import TensorSpec, check_sidecar

PATCHES = "patches"
SMALL = 1 / 6  # of a matrix's elements: its factors in float64, and their making, take no more than is counted for it


class LoraExpert(Checkpoint):
    """The expert that an adapter makes of a base. As a Checkpoint, the tensors of the adapter's file."""

    def __init__(
        self,
        files: Iterable[TensorReader],
        sidecars: Mapping[str, TensorReader],
        config: LoraConfig,
        base: Checkpoint,
        naming: Naming = SAME,
    ) -> None:
        """Raises BadSchema where the adapter does not fit the base, or does what cannot be merged."""
        super().__init__(files, sidecars)
        try:
            check_not_quantised(self.schema)
        except BadSchema as error:
            raise BadSchema(error.reason, str(error), ALONE) from None
        self._fit_rows(base, naming)
        self._base = base
        self._patches = patches_of(self, config, base.schema, naming)
        self._columns: dict[str, Tensor] = {}
        self._held: tuple[str, dict[str, Tensor]] = "", {}
        self.order = base.order
        layers = base.schema.keys() | {name.removesuffix(".weight") for name in base.schema}
        for kind, sidecar in self.beside.items():
            names = {ours: theirs for theirs, ours in naming.resolve(sidecar, layers).items()}
            self._beside[kind] = {ours: self._beside[kind][theirs] for ours, theirs in names.items()}
            check_sidecar(base.schema, kind, self.beside[kind])

    def _fit_rows(self, base: Checkpoint, naming: Naming) -> None:
        """A whole embedding, which PEFT saves where the vocabulary was resized, counts in the rows that both have; and
        a whole buffer in none."""
        whole = {theirs: parts[FULL] for theirs, parts in tensor_parts(self.schema).items() if FULL in parts}
        own = {ours: whole[theirs] for theirs, ours in naming.resolve(whole, base.schema).items()}
        self.note_buffers(own, self, base)
        self.fit({own[name]: name for name in common_rows(base, self.under(own))}, base)

    def older_content(self, base: Checkpoint) -> None:
        """That of an adapter was never another."""

    def content(self) -> str:
        """The sha256 that stands for what the adapter does to the base, whatever its file and its config call it.

        It is that of a listing, sorted: of each tensor that it changes its name in the base, and how, with the dtype,
        shape and sha256 of each part. The parts' own names, and what changes no weight, do not count.
        """
        return content_of(PATCHES, ([name, self._content(patch)] for name, patch in sorted(self._patches.items())))

    def replaces(self, name: str, *, alone: bool = True) -> bool:
        """True where the adapter brings a whole matrix of other values than this one of the base. The base's values in
        the adapter's dtype are no others.

        alone: and nothing else for it, and for this one name only, not for a tied weight's other name as well.
        """
        patch = self._patches.get(name)
        if patch is None or not patch.full or (alone and (patch.a or self.twins().get(patch.full))):
            return False
        spec, dtype = self._base.schema[name], self.schema[patch.full].dtype
        blocks = row_blocks(torch.empty(spec.shape[0], spec.row_numel, device="meta"))
        return not all(
            torch.equal(self.read(patch.full, rows), self._base.read(name, rows).to(dtype)) for rows in blocks
        )

    def merged_already(self) -> str | None:
        """A tensor of the base for which the adapter brings factors, and a weight that has their product in it already;
        None where there is none. Of a weight that is the base's, in the adapter's dtype, nothing more is read."""
        for name, patch in self._patches.items():
            if patch.full and patch.a and self.replaces(name, alone=False) and self._has_product(name, patch):
                return name
        return None

    @one_thread()
    def _has_product(self, name: str, patch: Patch) -> bool:
        """True where the weight, less the base's, is rather s B A than nothing."""
        spec, product = self._base.schema[name], replace(patch, full=None, magnitude=None, offset=None, tokens=None)
        without = within = 0.0
        for rows in row_blocks(torch.empty(spec.shape[0], spec.row_numel, device="meta")):
            base = self._base.read(name, rows)
            moved = self.read(str(patch.full), rows).double() - base.double()
            added = delta_of(base, product, self._parts(spec, product, rows)).double()
            without += float(moved.square().sum())
            within += float((moved - added).square().sum())
        return within < without / 4

    def touches(self, name: str) -> bool:
        """True where the adapter changes this tensor of the base."""
        return name in self._patches

    def fetch(self, spec: TensorSpec, rows: slice | None) -> Sequence[Tensor]:
        """The parts of the adapter that this tensor, or these rows of it, need; nothing where it is not touched."""
        patch = self._patches.get(spec.name)
        return self._parts(spec, patch, rows).listed() if patch else []

    def factors(self, spec: TensorSpec, fetched: Sequence[Tensor]) -> Factors | None:
        patch = self._patches.get(spec.name)
        if patch is None or not patch.a or len(spec.shape) != 2:
            return None
        m, n = spec.shape
        small = self.schema[patch.a].numel // (m if patch.transposed else n) * (m + n) <= SMALL * m * n
        return factors_of(patch, Parts.of(patch, fetched)) if small else None

    def delta(self, spec: TensorSpec, base: Tensor, fetched: Sequence[Tensor]) -> Tensor:
        patch = self._patches.get(spec.name)
        if patch is None:
            return torch.zeros(base.shape, dtype=torch.float32, device=base.device)
        return delta_of(base, patch, Parts.of(patch, fetched))

    def _content(self, patch: Patch) -> Mapping[str, object]:
        places = {part: self._places[name].content_entry() for part, name in patch.named().items()}
        scaled = patch.a or patch.offset
        return {
            **places,
            "scaling": patch.scaling if scaled else None,  # of a whole tensor, the config's alpha says nothing
            "transposed": bool(patch.a and patch.transposed),
            "rows": list(patch.rows),
        }

    def _parts(self, spec: TensorSpec, patch: Patch, rows: slice | None, *, columns: bool = True) -> Parts:
        """columns: with the factors of DoRA's columns, if it has any."""
        within = rows or slice(0, spec.shape[0] if spec.shape else 1)
        up = down = lengths = scales = at = values = None
        if patch.a and patch.b and patch.transposed:
            up, down = self._kept(spec, patch.a)[:, within].T, self._kept(spec, patch.b).T
        elif patch.a and patch.b:
            up, down = self.read(patch.b, rows).flatten(1), self._kept(spec, patch.a)
        if patch.magnitude and not patch.transposed:
            lengths = self._kept(spec, patch.magnitude).flatten()[within]
        elif patch.magnitude and columns:
            scales = self._scales(spec, patch)
        if patch.tokens:
            places = [(place, row) for place, row in enumerate(patch.rows) if within.start <= row < within.stop]
            at = torch.tensor([row - within.start for _, row in places], dtype=torch.int64)
            read = (self.read(patch.tokens, slice(place, place + 1)) for place, _ in places)
            values = torch.cat([self.read(patch.tokens, slice(0, 0)), *read])
        return Parts(
            full=self.read(patch.full, rows) if patch.full else None,
            up=up,
            down=down,
            lengths=lengths,
            columns=scales,
            offset=self.read(patch.offset, rows) if patch.offset else None,
            at=at,
            values=values,
        )

    @one_thread()
    def _scales(self, spec: TensorSpec, patch: Patch) -> Tensor:
        """m / ||column|| for every column of W0 + s B A, (n,), float64.

        The whole tensor decides, whatever rows are asked for, so the base's is read once more for it.
        """
        if spec.name not in self._columns and patch.magnitude:
            empty = torch.empty(spec.shape[0], spec.row_numel, device="meta")
            squares_N = torch.zeros(spec.row_numel, dtype=torch.float64)
            for rows in row_blocks(empty):
                parts = self._parts(spec, patch, rows, columns=False)
                squares_N += squared_columns(self._base.read(spec.name, rows), patch, parts)
            magnitude_N = self.read(patch.magnitude).flatten().double()
            self._columns[spec.name] = magnitude_N / squares_N.sqrt()
        return self._columns[spec.name]

    def _kept(self, spec: TensorSpec, name: str) -> Tensor:
        """A small tensor that every block of `spec` needs, read for the first of them."""
        if self._held[0] != spec.name:
            self._held = spec.name, {}
        held = self._held[1]
        if name not in held:
            held[name] = self.read(name)
        return held[name]
