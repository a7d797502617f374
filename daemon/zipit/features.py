"""What goes on in running models: the features of nodes, gathered batch by batch, and statistics of BatchNorm."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from daemon.errors import Reason, Refused
from daemon.zipit.calibration import Calibration, call
from projector.errors import BadValues
from projector.text import shown
from projector.zipping.graph import Node, Place
from projector.zipping.moments import Moments

PASS_BYTES = 2 << 30  # of sums over features that are kept at once; more nodes take another pass over the data
GRAPH_HINT = "mend the graph: docs/zipit.md has its form"


def gathered(
    calibration: Calibration, models: Sequence[nn.Module], nodes: Sequence[Node], sizes: Mapping[str, int]
) -> Iterator[tuple[Node, Moments]]:
    """The moments of each node's features in both models, on all of the data. Raises Refused and BadValues."""
    for group in _passes(nodes, sizes, len(models)):
        moments = {node.name: Moments() for node in group}
        for batch in calibration.batches():
            each = [features(model, batch, group, sizes) for model in models]
            for node in group:
                rows = [one[node.name] for one in each]
                _check_rows(node, rows)
                with of_node(node):
                    moments[node.name].add(rows)
        for node in group:
            yield node, moments.pop(node.name)


def features(model: nn.Module, batch: Any, nodes: Sequence[Node], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """(rows, n) of each node, where one model is run on one batch. Padding, by `attention_mask`, gives no row.

    Raises Refused, also where they are not as many as the node's tensors make.
    """
    places = [place for node in nodes for place in node.places]
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    with torch.inference_mode(), _listening(model, places) as heard:
        call(model, batch)
    found = {}
    for node in nodes:
        pieces = []
        for place in node.places:
            if not heard[place]:
                raise Refused(Reason.ZIPIT, f"{node.name}: the model does not run {shown(place.module)}", GRAPH_HINT)
            pieces += [_rows(one, place, mask) for one in heard[place]]
        for one in pieces:
            _check_size(node, one, sizes[node.name])
        found[node.name] = torch.cat(pieces)
    return found


@contextmanager
def of_node(node: Node) -> Iterator[None]:
    """Lets an error about features say of which node they are."""
    try:
        yield
    except BadValues as error:
        raise BadValues(error.reason, f"{shown(node.name)}: {error}", error.hint) from None


def _passes(nodes: Sequence[Node], sizes: Mapping[str, int], models: int) -> Iterator[list[Node]]:
    group: list[Node] = []
    held = 0
    for node in nodes:
        needed = 8 * (models * sizes[node.name]) ** 2
        if group and held + needed > PASS_BYTES:
            yield group
            group, held = [], 0
        group.append(node)
        held += needed
    yield group


@contextmanager
def _listening(model: nn.Module, places: Sequence[Place]) -> Iterator[dict[Place, list[Tensor]]]:
    heard: dict[Place, list[Tensor]] = {place: [] for place in places}
    hooks = []
    modules = dict(model.named_modules())
    for place in heard:
        if place.module not in modules:
            raise Refused(Reason.ZIPIT, f"the model has no module {shown(place.module)}", GRAPH_HINT)
        module = modules[place.module]
        if place.output:
            hooks.append(module.register_forward_hook(lambda _m, _i, out, place=place: _hear(heard, place, out)))
        else:
            hooks.append(
                module.register_forward_pre_hook(
                    lambda _m, args, words, place=place: _hear(heard, place, (*args, *words.values())), with_kwargs=True
                )
            )
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _hear(heard: dict[Place, list[Tensor]], place: Place, value: Any) -> None:
    first = value[0] if isinstance(value, tuple) and value else value
    if not isinstance(first, Tensor):
        raise Refused(Reason.ZIPIT, f"{shown(place.module)} gives or takes no tensor first", GRAPH_HINT)
    heard[place].append(first.detach().clone())  # what comes next may work in place


def _rows(features: Tensor, place: Place, mask: Any) -> Tensor:
    if not -features.ndim <= place.axis < features.ndim:
        what = f"the features at {shown(place.module)} have no axis {place.axis}, being {list(features.shape)}"
        raise Refused(Reason.ZIPIT, what, GRAPH_HINT)
    last = features.movedim(place.axis, -1)
    if isinstance(mask, Tensor) and mask.shape == last.shape[:-1]:
        return last[mask.bool()]
    return last.reshape(-1, last.shape[-1])


def _check_size(node: Node, rows: Tensor, size: int) -> None:
    if rows.shape[1] != size:
        what = f"{shown(node.name)} has {size} features by its tensors, and {rows.shape[1]} where they are taken"
        raise Refused(Reason.ZIPIT, what, GRAPH_HINT)


def _check_rows(node: Node, rows: Sequence[Tensor]) -> None:
    if len({len(one) for one in rows}) > 1:
        what = f"{node.name} has other rows of features in each model for the same inputs"
        raise Refused(Reason.ZIPIT, what, "zip models that take the same inputs alike")


def first_output(value: Any) -> Tensor:
    """The tensor that a model gives: its logits, or what comes first."""
    while not isinstance(value, Tensor):
        values = list(value.values()) if isinstance(value, Mapping) else value
        if isinstance(value, Mapping) and "logits" in value:
            value = value["logits"]
        elif isinstance(values, tuple | list) and values:
            value = values[0]
        else:
            raise Refused(Reason.ZIPIT, "the model gives no tensor", "let its forward return one, first or as logits")
    return value


def normed(calibration: Calibration, model: nn.Module) -> dict[str, Tensor]:
    """The statistics of a model's BatchNorm layers on the data, by the names of the buffers; the model keeps them."""
    norms = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }
    if not norms:
        return {}
    before = {name: module.momentum for name, module in norms.items()}
    for module in norms.values():
        module.reset_running_stats()
        module.momentum = None  # the plain mean over batches
        module.train()
    with torch.no_grad():
        for batch in calibration.batches():
            call(model, batch)
    found: dict[str, Tensor] = {}
    for name, module in norms.items():
        module.eval()
        module.momentum = before[name]
        found |= {f"{name}.{key}": value.cpu().clone() for key, value in module.named_buffers()}
    return found
