"""Models whose modules transformers 5 calls otherwise than their files do: what an adapter's names are in the base."""

from collections.abc import Mapping

from projector.names.naming import Naming
from projector.spec import Schema

Shape = tuple[int, ...]

ATTENTION = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
MLP = {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}


def _encoder(root: str) -> dict[str, str]:
    layers, blocks = f"{root}.layers", f"{root}.encoder.layer"
    pairs = {f"{layers}.*.{ours}": f"{blocks}.*.{theirs}" for ours, theirs in (ATTENTION | MLP).items()}
    return pairs | {layers: blocks}


FAMILIES: Mapping[str, Mapping[str, str]] = {
    **{root: _encoder(root) for root in ("vit", "deit", "beit", "audio_spectrogram_transformer")},
    "dinov2": {f"dinov2.encoder.layer.*.{new}": f"dinov2.encoder.layer.*.{old}" for new, old in ATTENTION.items()},
}
"""By what all of a model's names begin with, `prefixes` as in docs/adapters.md, which has more of them."""


def family_pairs(unknown: Mapping[str, Shape], base: Schema) -> dict[str, str]:
    """Those pairs of the one family that make tensors of the base of all that are unknown, by name and shape; none
    where no family does, or several do.

    unknown: names and shapes; a shape may be turned round, and () is any.
    """
    fitting = []
    for pairs in FAMILIES.values():
        made = Naming(pairs).resolve(unknown, base)
        if made and all(
            ours in base and (not unknown[name] or sorted(unknown[name]) == sorted(base[ours].shape))
            for name, ours in made.items()
        ):
            single = {pair: Naming(dict([pair])) for pair in pairs.items()}
            fitting.append(
                dict(pair for pair, naming in single.items() if any(made[name] in naming.tried(name) for name in made))
            )
    return fitting[0] if len(fitting) == 1 else {}
