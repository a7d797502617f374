"""Which tensor of an expert stands for which of the base: names, tied weights, what is left out."""

from collections.abc import Iterable, Mapping

from projector.buffers import is_sinusoidal
from projector.naming import Naming
from projector.resized import common_rows, spread
from projector.source import Checkpoint
from projector.spec import LEAST_ROWS, Schema, check_schema, check_sidecar

POSITIONS = ("pos", "pe.")


def matched(base: Checkpoint, expert: Checkpoint, naming: Naming) -> Checkpoint:
    """The expert and its sidecars under the names of the base, and nothing else. Raises BadSchema where it is unfit.

    A tied weight is one tensor under several names: in a file, matrices with the same values, and tensors that its
    metadata says were one (see `Checkpoint.twins`). Of those,

    - a name that the base has not is left out, where the expert has the same values under a name of the base too;
    - a name of the base that the expert has not gets what the expert has for a twin of it in the base: the task vector
      of both is one.

    A tensor of the base that `naming` lets the expert lack is the base's, and so is a table of positions that is all
    sines and cosines, which may be missing in either. A vocabulary of another size is merged in the rows that both have
    (see `common_rows`). A sidecar's names follow the same rules.
    """
    schema = base.schema
    own = {ours: theirs for theirs, ours in naming.resolve(expert.schema, schema).items()}
    aliases = _aliases(own, schema, expert)
    own = {ours: theirs for ours, theirs in own.items() if ours not in aliases}
    absent = [name for name, spec in schema.items() if spec.merged and name not in own]
    twins = base.twins() if absent else {}
    follows = {name: twin for name in absent for twin in twins.get(name, ()) if twin in own}
    own |= {name: own[twin] for name, twin in follows.items()}
    lent = [name for name in absent if name not in own and (naming.lacks(name) or _sinusoidal(base, name))]
    resized = common_rows(base, expert.under(own))
    check_schema(schema, expert.under(own, resized=resized, lent=lent, base=base).schema, own)
    beside = {kind: _sidecar(naming, sidecar, schema, aliases) for kind, sidecar in expert.beside.items()}
    merged = {name: theirs for name, theirs in own.items() if name in schema and not schema[name].derived}
    found = expert.under(merged, beside, follows, resized, lent, base)
    found.note_buffers(own, expert, base)
    for kind, sidecar in found.beside.items():
        check_sidecar(schema, kind, sidecar)
    return found


def _aliases(own: Mapping[str, str], base: Schema, expert: Checkpoint) -> set[str]:
    """The floating tensors that the base has not, and the expert has twice, or that nobody trained."""
    schema = expert.schema
    surplus = [name for name, theirs in own.items() if name not in base and schema[theirs].merged]
    known = {theirs for ours, theirs in own.items() if ours in base}
    twins = expert.twins() if surplus else {}
    return {
        name for name in surplus if not known.isdisjoint(twins.get(own[name], ())) or _sinusoidal(expert, own[name])
    }


def _sinusoidal(checkpoint: Checkpoint, name: str) -> bool:
    """True for a table of positions that follows from its size; the same in every expert, saved with it or not."""
    spec = checkpoint.schema[name]
    if len(spec.shape) != 2 or spec.shape[0] < LEAST_ROWS or not any(part in name for part in POSITIONS):
        return False
    return is_sinusoidal(checkpoint.sample(name, spread(spec.shape[0])))


def _sidecar(naming: Naming, sidecar: Schema, base: Schema, aliases: Iterable[str]) -> dict[str, str]:
    """The names of the tensors in a sidecar that count: the base's, or a layer's -> the sidecar's own."""
    layers = _layers(base)
    names = (name for name in sidecar if name in layers or not naming.ignores(f"{name}.weight"))
    resolved = naming.resolve(names, base.keys() | layers)
    left_out = {*aliases, *_layers(aliases)}
    return {ours: theirs for theirs, ours in resolved.items() if ours not in left_out}


def _layers(names: Iterable[str]) -> set[str]:
    return {name.removesuffix(".weight") for name in names}
