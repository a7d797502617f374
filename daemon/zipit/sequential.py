"""The graph of an nn.Sequential: a node between each two layers that have weights."""

from dataclasses import dataclass, field

from torch import nn

from daemon.errors import Reason, Refused
from projector.zipping.graph import Graph, Node, Place, Reading

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SCALING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)
ONE_BY_ONE = (
    *(
        nn.ReLU,
        nn.ReLU6,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Tanh,
        nn.Sigmoid,
        nn.LeakyReLU,
        nn.ELU,
        nn.Softplus,
        nn.Hardtanh,
    ),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
)
"""What does the same to each feature, whatever the others are."""
OWN_GRAPH = "describe the model's graph in a file, and give it with --graph: see docs/zipit.md"


@dataclass
class _Open:
    """Features that were made and not yet read."""

    name: str
    made: dict[str, int]
    size: int
    axis: int
    place: str
    flat: bool = field(default=False)


def sequential_graph(model: nn.Sequential) -> Graph:
    """Its nodes, each called as the layer that makes it. Raises Refused where a layer is of an unknown kind."""
    nodes: list[Node] = []
    now: _Open | None = None
    for name, layer in _layers(model, ""):
        if isinstance(layer, LINEAR):
            if getattr(layer, "groups", 1) != 1:
                raise _unknown(name, "a convolution in groups")
            if now:
                each = layer.in_features // now.size if now.flat and isinstance(layer, nn.Linear) else 1
                place = Place(now.place, output=True, axis=now.axis)
                nodes.append(Node(now.name, (place,), now.made, {f"{name}.weight": Reading(1, each)}))
            made = {f"{name}.weight": 0} | ({f"{name}.bias": 0} if layer.bias is not None else {})
            channels = not isinstance(layer, nn.Linear)
            now = _Open(name, made, layer.weight.shape[0], 1 if channels else -1, name)
        elif isinstance(layer, SCALING):
            if now is None:
                raise _unknown(name, "a norm over the inputs")
            if now.flat or (isinstance(layer, nn.LayerNorm) and (len(layer.normalized_shape) > 1 or now.axis == 1)):
                raise _unknown(name, "a norm over places, not features,")
            tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
            now.made |= {f"{name}.{key}": 0 for key, tensor in tensors.items() if tensor.ndim}
            now.place = name
        elif isinstance(layer, nn.Flatten):
            if layer.start_dim != 1 or layer.end_dim != -1:
                raise _unknown(name, "a Flatten of other axes")
            if now and now.axis == 1:
                now.flat = True
        elif isinstance(layer, ONE_BY_ONE):
            if now and not now.flat:
                now.place = name
        else:
            raise _unknown(name, type(layer).__name__)
    if not nodes:
        raise Refused(Reason.ZIPIT, "the model has no features between two layers", OWN_GRAPH)
    return Graph(tuple(nodes))


def _layers(model: nn.Sequential, before: str) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    for name, layer in model.named_children():
        path = f"{before}{name}"
        found += _layers(layer, f"{path}.") if isinstance(layer, nn.Sequential) else [(path, layer)]
    return found


def _unknown(name: str, kind: str) -> Refused:
    return Refused(Reason.ZIPIT, f"{name}: {kind} is no layer whose graph is known", OWN_GRAPH)
