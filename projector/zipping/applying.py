"""Weights zipped along a graph: W* = sum over models of M_i W_i U_i."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from projector.errors import BadSchema, Reason
from projector.spec import Schema
from projector.text import listed, shown
from projector.zipping.graph import Graph
from projector.zipping.pairing import Pairing

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Axes:
    """What of one tensor belongs to which node. made: (node, axis). read: (node, axis, each), one or more."""

    made: tuple[str, int] | None
    read: Sequence[tuple[str, int, int]]


def axes_of(graph: Graph) -> dict[str, Axes]:
    """The tensors of a graph's nodes."""
    made = {name: (node.name, axis) for node in graph.nodes for name, axis in node.made.items()}
    read: dict[str, list[tuple[str, int, int]]] = {}
    for node in graph.nodes:
        for name, one in node.read.items():
            read.setdefault(name, []).append((node.name, one.axis, one.each))
    return {name: Axes(made.get(name), read.get(name, [])) for name in {**made, **read}}


def shared_names(graph: Graph, names: Sequence[str], *, whole: bool) -> list[str]:
    """Which tensors all models share once they are zipped along the graph; the others stay each model's own."""
    if whole:
        return list(names)
    ours = {name for node in graph.nodes for name in (*node.made, *node.averaged)}
    return [name for name in names if name in ours]


def check_alike(graph: Graph, first: Schema, second: Schema, *, whole: bool) -> None:
    """Raises BadSchema where the second model's tensors, as far as they are zipped, are not those of the first."""
    merged = [name for name, spec in first.items() if spec.merged]
    needed = {*shared_names(graph, merged, whole=whole), *axes_of(graph)}
    missing = sorted(name for name in needed if name not in second)
    unknown = sorted(name for name, spec in second.items() if spec.merged and name not in first) if whole else []
    hint = "zip models of one architecture and size; where only their heads differ, up to a node: --to"
    if missing or unknown:
        what = f"lacks {listed(missing)}" if missing else f"has also {listed(unknown)}"
        reason = Reason.MISSING_TENSOR if missing else Reason.UNEXPECTED_TENSOR
        raise BadSchema(reason, f"the second model {what}", hint)
    axes = axes_of(graph)
    for name in sorted(needed):
        one, other = first[name].shape, second[name].shape
        if not whole and name in axes and not axes[name].made:  # a head: only what it reads need be alike
            alike = len(one) == len(other) and all(one[axis] == other[axis] for _, axis, _ in axes[name].read)
        else:
            alike = one == other
        if not alike:
            raise BadSchema(
                Reason.WRONG_SHAPE,
                f"{shown(name)} is {list(one)} in the first model and {list(other)} in another",
                hint,
            )


def zip_tensor(
    tensors: Sequence[Tensor], axes: Axes | None, pairings: Mapping[str, Pairing], weights: Sequence[float]
) -> Tensor:
    """One shared tensor of the models', in float64: zipped along its node's axis, else the mean by their weights."""
    made = axes.made if axes else None
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for model, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        part = unmerged(tensor.to(torch.float64), axes, pairings, model)
        total += pairings[made[0]].merge(part, made[1], model) if made else part * weight
    return total


def unmerged(tensor: Tensor, axes: Axes | None, pairings: Mapping[str, Pairing], model: int) -> Tensor:
    """A model's own tensor as it reads zipped features."""
    for node, axis, each in axes.read if axes else ():
        tensor = pairings[node].unmerge(tensor, axis, model, each)
    return tensor


def shuffled(weights: Weights, graph: Graph, orders: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same model with each node's features in another order: it computes the same, if the graph is right."""
    moved = {
        name: Pairing(order[None], torch.ones(1, len(order), dtype=torch.float64)) for name, order in orders.items()
    }
    axes = axes_of(graph)
    return {
        name: zip_tensor([tensor], axes[name], moved, [1.0]).to(tensor.dtype) if name in axes else tensor
        for name, tensor in weights.items()
    }


def cosine(first: Weights, second: Weights, names: Sequence[str]) -> float:
    """Of two models' tensors of these names, as one long vector each; 1 where there is none."""
    dot = one = other = 0.0
    for a, b in ((first[name].double(), second[name].double()) for name in names):
        dot, one, other = dot + float((a * b).sum()), one + float((a * a).sum()), other + float((b * b).sum())
    return dot / (one * other) ** 0.5 if one and other else 1.0
