"""The graph of a transformer, from the names of its tensors: a node for the hidden features of each layer's MLP.

What the layers add up (the residual stream) and attention stay as they are, feature by feature: averaged. That is right
for experts of one base, whose streams mean the same; of models that were initialised differently it makes noise, which
is refused. The authors could not zip such transformers either, for their heads and positions
(https://github.com/gstoica27/ZipIt/issues/31).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from daemon.errors import Reason, Refused
from daemon.zipit.sequential import OWN_GRAPH
from projector.names.depth import layers
from projector.zipping.graph import Graph, Node, Place, Reading


@dataclass(frozen=True)
class Family:
    """Names of modules within a layer: makers, of what makes the hidden features, gates too; reader, of what reads
    them.

    later: what of a layer comes behind the reader. first: what comes before all layers.
    """

    makers: tuple[str, ...]
    reader: str
    later: str = r"$^"
    first: str = r"(^|\.)(embeddings|embed_tokens|wte|wpe)\."


FAMILIES = (
    Family(("intermediate.dense",), "output.dense", later=r"output\.LayerNorm\."),  # BERT, RoBERTa, ViT
    Family(("ffn.lin1",), "ffn.lin2", later=r"output_layer_norm\."),  # DistilBERT
    Family(("mlp.c_fc",), "mlp.c_proj"),  # GPT-2
    Family(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),  # Llama, Mistral, Qwen
)
NOT_THESE = re.compile(r"(pre|post)_feedforward_layernorm|\.experts?\.|crossattention|\.encoder_attn\.")


def family_graph(model: nn.Module, weights: Mapping[str, Tensor]) -> Graph:
    """Its nodes, each called as its layer. Raises Refused where its names are of no known family."""
    lists = layers(weights)
    if len(lists) <= 1 and not any(NOT_THESE.search(name) for name in weights):
        for family in FAMILIES:
            if found := tuple(_nodes(family, model, weights)):
                return Graph(found, one_base=True)
    kind = type(model).__name__
    raise Refused(Reason.ZIPIT, f"{kind} is neither an nn.Sequential nor of a family whose graph is known", OWN_GRAPH)


def _nodes(family: Family, model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[Node]:
    reading = re.compile(rf"(?P<layer>.*\.(?P<number>\d+))\.{re.escape(family.reader)}\.weight")
    found = [match for match in map(reading.fullmatch, weights) if match]
    before = [name for name in weights if re.search(family.first, name)]
    for match in sorted(found, key=lambda one: int(one["number"])):
        layer, reader = match["layer"], match[0]
        made = {
            f"{layer}.{maker}.{kind}": _features(weights, f"{layer}.{maker}", kind)
            for maker in family.makers
            for kind in ("weight", "bias")
            if f"{layer}.{maker}.{kind}" in weights
        }
        if any(f"{layer}.{maker}.weight" not in made for maker in family.makers):
            continue
        axis = 1 - _outputs(weights, f"{layer}.{family.reader}")
        own = [name for name in weights if name.startswith(f"{layer}.") and name not in made and name != reader]
        later = re.compile(rf"{re.escape(layer)}\.({re.escape(family.reader)}\.bias$|{family.later})")
        late = [name for name in own if later.match(name)]
        place = Place(_module(model, reader, weights), output=False)
        before += [name for name in own if name not in late]
        yield Node(layer, (place,), made, {reader: Reading(axis)}, tuple(before))
        before = [reader, *late]


def _features(weights: Mapping[str, Tensor], module: str, kind: str) -> int:
    return _outputs(weights, module) if kind == "weight" else 0


def _outputs(weights: Mapping[str, Tensor], module: str) -> int:
    """Which axis of a matrix is of what comes out: 1 in GPT-2, whose linear layers are stored transposed."""
    return 1 if module.rpartition(".")[2] in ("c_fc", "c_proj") and _transposed(weights, module) else 0


def _transposed(weights: Mapping[str, Tensor], module: str) -> bool:
    bias = weights.get(f"{module}.bias")
    return bias is not None and weights[f"{module}.weight"].shape[1] == len(bias)


def _module(model: nn.Module, tensor: str, weights: Mapping[str, Tensor]) -> str:
    """The module that a tensor belongs to; where transformers calls it otherwise than the file, the one that has its
    values.
    """
    name, _, _ = tensor.rpartition(".")
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if name in modules:
        return name
    wanted = weights[tensor]
    for other, module in modules.items():
        own = getattr(module, "weight", None)
        if isinstance(own, Tensor) and own.shape == wanted.shape and bool((own.detach() == wanted.to(own.dtype)).all()):
            return other
    raise Refused(Reason.ZIPIT, f"the running model has no module with the weights {tensor}", OWN_GRAPH)
