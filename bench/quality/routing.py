"""smile with its router: the state of a stream as a model whose linear layers choose among the experts.

The tensors are those of `mainstem export`, and the layers those of the module that lies beside an exported model.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bench.quality.family import Family
from bench.quality.folding import Stream
from daemon.versions.modeling_smile import ROUTED
from projector.algebra.linalg import one_thread
from projector.driver.routed import RoutedModel
from projector.methods import make

TOP = (1, 2)  # experts that a token goes through; one is the default
PUBLISHED = "published"


@one_thread()
def scored(family: Family, order: Sequence[str], cap: int) -> dict[str, dict[str, float]]:
    """What these experts score, each task of theirs: published, as a merged model, and routed, by `top_k`."""
    tasks = family.learned(order)
    with Stream(make("smile", {"cap": cap}), family.base) as stream:
        for name in order:
            stream.take(family.experts[name])
        found = {PUBLISHED: dict(family.score(stream.weights(), tasks))}
        for top_k in TOP:
            model = routed(stream.routed(), family.runs.model(), top_k)
            found[str(top_k)] = {task: family.runs.accuracy(model, task) for task in tasks}
    return found


def routed(found: RoutedModel, model: nn.Module, top_k: int) -> nn.Module:
    """The model, its weights and its linear layers replaced."""
    method = found.method
    smile = {
        "rank": method.rank,
        "gate_rank": method.gate_rank,
        "top_k": top_k,
        "experts": len(method.places(found.totals)),
    }
    known = dict(model.named_modules())
    for name in found.layers:
        module = known[name]
        if type(module) in ROUTED:
            module.__class__ = ROUTED[type(module)]
            module.add_experts(smile)
    left = model.load_state_dict(_tensors(found), strict=False)
    assert not left.missing_keys, left.missing_keys
    return model


def _tensors(found: RoutedModel) -> Mapping[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    for name, _, rows in found.tensors(found.base.schema):
        parts.setdefault(name, []).append(rows)
    return {name: torch.cat(rows) if len(rows) > 1 else rows[0] for name, rows in parts.items()}
