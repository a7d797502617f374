"""Which tensors of the base an adapter changes, and how: its names and shapes held against the base's."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from projector.errors import BadSchema, Reason
from projector.files.source import Checkpoint
from projector.lora.absent import ANOTHER_BASE, absent
from projector.lora.config import MERGE_FIRST, LoraConfig
from projector.lora.delta import Patch
from projector.lora.keys import FULL, MAGNITUDE, OFFSET, TOKENS, A, B, is_embedding, module_names, tensor_parts, wrapped
from projector.lora.tied import Tied
from projector.names.naming import Naming
from projector.spec import OTHER_ROWS, Schema, TensorSpec, resized_rows
from projector.text import shown

GATHER = "gather the parameters before save_pretrained (ZeRO-3, FSDP), and drop the adapter again"
ALONE = "save the adapter with peft's save_pretrained, which leaves out the quantised layers that it lies over"
RESIZED = (
    "merge it into the model that it was trained on (merge_and_unload), save that and drop it: of a vocabulary of"
    " another size the rows that both have are merged"
)
MOST_RANK = 1024  # of a weight whose shorter side is less: a factor is in memory whole
MISMATCH = "adapter_config.json and adapter_model.safetensors must be of one adapter: save both again"


def patches_of(adapter: Checkpoint, config: LoraConfig, base: Schema, naming: Naming) -> dict[str, Patch]:
    """What the adapter does to each tensor of the base that it changes, by its name in the base.

    A buffer of whole numbers or a derived one stays the base's, and so does what `naming` ignores. A whole tensor that
    the base has not is left out where the adapter has the same values for one that it has: a tied weight under its
    other name.
    Raises BadSchema.
    """
    schema = adapter.schema
    known = tensor_parts(schema)
    if not known:
        raise BadSchema(Reason.MISSING_TENSOR, "the adapter's file has no tensor", GATHER)
    resolved = _resolved(known, base, naming)
    at_home = {theirs: known[theirs] for theirs, ours in resolved.items() if ours in base}
    tied = Tied(adapter, config, at_home)
    shaper = _Shaper(schema, config, known)
    patches = {}
    for theirs, ours in resolved.items():
        parts = known[theirs]
        floating = any(schema[name].merged for name in parts.values())
        if ours not in base and floating and not tied.repeats(theirs, parts):
            unknown = {name: shaper.wanted(known[name]) for name, wanted in resolved.items() if wanted not in base}
            raise absent(theirs, parts, unknown, base, naming, bool(at_home))
        if ours in base and base[ours].merged:
            patches[ours] = shaper.patch(theirs, base[ours])
    shaper.check_squares()
    return patches


def _resolved(known: Mapping[str, Mapping[str, str]], base: Collection[str], naming: Naming) -> dict[str, str]:
    """The base's name of each tensor, as Naming.resolve finds it: first by what PEFT calls it, then by the name with
    what a wrapper put before that, of which the settings may speak too."""
    plain = naming.resolve(known, base)
    names = {theirs: theirs if ours in base else wrapped(theirs, known[theirs]) for theirs, ours in plain.items()}
    found = naming.resolve(names.values(), base)
    kept = {theirs: found[name] for theirs, name in names.items() if name in found}
    return {theirs: ours if ours in base else plain[theirs] for theirs, ours in kept.items()}


class _Shaper:
    """Makes patches, and holds the shapes of their parts against the base's."""

    def __init__(self, schema: Schema, config: LoraConfig, known: Mapping[str, Mapping[str, str]]) -> None:
        self._schema = schema
        self._config = config
        self._known = known
        self._squares: list[str] = []
        self._layouts: set[bool] = set()

    def wanted(self, parts: Mapping[str, str]) -> tuple[int, ...]:
        """The shape that the tensor of the model has by these parts; () where they do not say."""
        if FULL in parts:
            return self._schema[parts[FULL]].shape
        if A not in parts or B not in parts:
            return ()
        a, b = (self._schema[parts[part]].shape for part in (A, B))
        shape = (b[0], *a[1:]) if a and b else ()
        return shape[::-1] if is_embedding(parts) else shape

    def patch(self, target: str, spec: TensorSpec) -> Patch:
        """What the parts for `target`, a name as the adapter has it, do to the tensor `spec` of the base."""
        parts = self._known[target]
        module = self._module(target, spec.name, parts)
        patch = Patch(scaling=self._config.scaling(module))
        for name in parts.values():
            if not self._schema[name].floating:
                detail = f"{shown(name)} is {self._schema[name].dtype}".replace("torch.", "")
                hint = "save the adapter as float32, float16 or bfloat16" if name != parts.get(FULL) else ALONE
                raise BadSchema(Reason.UNSUPPORTED_DTYPE, detail, hint)
        if FULL in parts:
            resized = resized_rows(spec.shape, self._schema[parts[FULL]].shape)
            self._hold(parts[FULL], spec.shape, OTHER_ROWS if resized else ANOTHER_BASE)
            patch = replace(patch, full=parts[FULL])
        if A in parts or B in parts:
            patch = self._factors(patch, module, target, parts, spec)
            self._check_targeted(module_names(target, spec.name, parts), parts[A])
        if MAGNITUDE in parts or (self._config.use_dora and patch.a):
            patch = replace(patch, magnitude=self._magnitude(module, parts, spec, patch))
        if OFFSET in parts:
            patch = replace(patch, offset=self._offset(parts, spec))
        if TOKENS in parts:
            patch = replace(patch, tokens=parts[TOKENS], rows=self._tokens(module, parts[TOKENS], spec))
        return patch

    def _module(self, target: str, ours: str, parts: Mapping[str, str]) -> str:
        """The name by which the config's patterns go. Raises BadSchema where it could be two of which they say
        different things."""
        first, *others = module_names(target, ours, parts)
        for other in others:
            if A in parts and self._config.says(first) != self._config.says(other):
                raise BadSchema(
                    Reason.UNEXPECTED_TENSOR,
                    f"rank_pattern or alpha_pattern says one thing of {shown(first)}, another of {shown(other)}, and "
                    "the module may have been called either when it was trained",
                    "save the adapter with save_pretrained, or write these patterns without ^, as the end of the name",
                )
        return first

    def _check_targeted(self, modules: Sequence[str], factor: str) -> None:
        """Raises BadSchema where PEFT would put no LoRA into the module, by any of its names."""
        if all(map(self._config.targets.leaves_out, modules)):
            raise BadSchema(
                Reason.UNEXPECTED_TENSOR,
                f"{shown(factor)} is there, but adapter_config.json has no LoRA of {shown(modules[0])}: "
                "peft leaves it out",
                "save both files again; or, if it was trained, take target_modules, exclude_modules and "
                "layers_to_transform out of adapter_config.json",
            )

    def check_squares(self) -> None:
        """A square matrix lies as the flag says; raises BadSchema where another of this adapter belies the flag."""
        if self._squares and (not self._config.fan_in_fan_out) in self._layouts:
            raise BadSchema(
                Reason.WRONG_SHAPE,
                f"{shown(self._squares[0])} is square, and fan_in_fan_out does not say whether it is transposed: "
                "it is wrong for others of this adapter",
                MERGE_FIRST,
            )

    def _factors(self, patch: Patch, module: str, target: str, parts: Mapping[str, str], spec: TensorSpec) -> Patch:
        if A not in parts or B not in parts:
            there, missing = (A, B) if A in parts else (B, A)
            detail = f"{shown(parts[there])} has no lora_{missing} beside it"
            raise BadSchema(Reason.MISSING_TENSOR, detail, "save the whole adapter with save_pretrained")
        a, b = self._schema[parts[A]], self._schema[parts[B]]
        for factor in (a, b):
            if len(factor.shape) < 2 or 0 in factor.shape:
                detail = f"{shown(factor.name)} has shape {list(factor.shape)}: a part of it, or nothing, was saved"
                raise BadSchema(Reason.WRONG_SHAPE, detail, GATHER)
        transposed = self._transposed(module, a, b, spec, is_embedding(parts))
        rank = self._config.rank(module)
        if (a.shape[0], b.shape[1]) != (rank, rank):
            raise BadSchema(
                Reason.WRONG_SHAPE,
                f"{shown(module)} has factors of rank {a.shape[0]} and {b.shape[1]}, its config says {rank}",
                MISMATCH,
            )
        if rank > (most := max(MOST_RANK, min(spec.shape[0], spec.row_numel))):
            detail = f"{shown(module)} has factors of rank {rank}, more than {most} add nothing to {list(spec.shape)}"
            raise BadSchema(Reason.WRONG_SHAPE, detail, MERGE_FIRST)
        if self._config.lora_bias and OFFSET not in self._known.get(f"{target.rpartition('.')[0]}.bias", {}):
            raise BadSchema(Reason.MISSING_TENSOR, f"{shown(module)} has no lora_B.bias, lora_bias is set", MISMATCH)
        return replace(patch, a=parts[A], b=parts[B], transposed=transposed)

    def _transposed(self, module: str, a: TensorSpec, b: TensorSpec, spec: TensorSpec, embedding: bool) -> bool:
        """Whether B A is the transpose of the base's tensor. Raises BadSchema where it is neither that nor like it."""
        shape = (b.shape[0], *a.shape[1:])
        same = len(a.shape) == len(b.shape) and set(b.shape[2:]) <= {1} and spec.shape == shape
        turned = len(a.shape) == len(b.shape) == 2 and spec.shape == shape[::-1]
        if embedding and turned:
            return True
        if embedding or not (same or turned):
            raise self._misshapen(module, a, b, spec, embedding)
        if same and turned:
            self._squares.append(module)
            return self._config.fan_in_fan_out
        if len(spec.shape) == 2:
            self._layouts.add(turned)
        return turned

    def _misshapen(self, module: str, a: TensorSpec, b: TensorSpec, spec: TensorSpec, embedding: bool) -> BadSchema:
        detail = f"{shown(module)} has factors {list(b.shape)} and {list(a.shape)}, the weight is {list(spec.shape)}"
        if len(spec.shape) == 3 and len(a.shape) == 2:
            return BadSchema(Reason.WRONG_SHAPE, f"{detail}: target_parameters of stacked experts", MERGE_FIRST)
        if len(spec.shape) > 2 and len(a.shape) > 1 and spec.shape[1] != a.shape[1]:
            return BadSchema(Reason.WRONG_SHAPE, f"{detail}: a convolution in groups", MERGE_FIRST)
        resized = resized_rows(spec.shape, (b.shape[0], *a.shape[1:])[:: -1 if embedding else 1])
        return BadSchema(Reason.WRONG_SHAPE, detail, RESIZED if resized else ANOTHER_BASE)

    def _magnitude(self, module: str, parts: Mapping[str, str], spec: TensorSpec, patch: Patch) -> str:
        if MAGNITUDE not in parts or not patch.a or not self._config.use_dora:
            detail = f"{shown(module)} has only one of use_dora, its factors and lora_magnitude_vector"
            raise BadSchema(Reason.MISSING_TENSOR, detail, MISMATCH)
        name = parts[MAGNITUDE]
        outputs = spec.row_numel if patch.transposed else spec.shape[0]
        if self._schema[name].numel != outputs:
            detail = f"{shown(name)} has {self._schema[name].numel} values for {outputs} outputs"
            raise BadSchema(Reason.WRONG_SHAPE, detail, GATHER)
        return name

    def _offset(self, parts: Mapping[str, str], spec: TensorSpec) -> str:
        self._hold(parts[OFFSET], spec.shape, ANOTHER_BASE)
        if not self._config.lora_bias:
            detail = f"{shown(parts[OFFSET])} is there, but lora_bias is not set"
            raise BadSchema(Reason.UNEXPECTED_TENSOR, detail, MISMATCH)
        return parts[OFFSET]

    def _tokens(self, module: str, name: str, spec: TensorSpec) -> Sequence[int]:
        rows = self._config.tokens(module)
        self._hold(name, (len(rows), *spec.shape[1:]), MISMATCH)
        if len(set(rows)) < len(rows) or not all(0 <= row < spec.shape[0] for row in rows):
            detail = f"trainable_token_indices of {shown(module)} are not different rows of the base's {spec.shape[0]}"
            raise BadSchema(Reason.WRONG_SHAPE, detail, RESIZED)
        return rows

    def _hold(self, name: str, wanted: tuple[int, ...], hint: str) -> None:
        shape = self._schema[name].shape
        if shape != wanted:
            detail = f"{shown(name)} has shape {list(shape)} instead of {list(wanted)}"
            raise BadSchema(Reason.WRONG_SHAPE, detail, GATHER if 0 in shape else hint)
