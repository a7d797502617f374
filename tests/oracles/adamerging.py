"""AdaMerging (arXiv 2310.02575), layer-wise, straight from its formula: autograd through the model in float64, with the
coefficients as leaves and every expert in memory."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

Batches = Callable[[int], Sequence[Tensor]]


def adamerging(
    model: nn.Module,
    base: Mapping[str, Tensor],
    experts: Sequence[Mapping[str, Tensor]],
    weights: Sequence[float],
    batches: Batches,
    *,
    steps: int,
    start: float,
    lr: float,
) -> tuple[dict[str, Tensor], list[float]]:
    """By tensor, the coefficients (T,) as they count after these steps, and the entropy at each.

    Task vectors are rounded to float32, as they are everywhere. The model's logits come from `batches(step)`.
    """
    taus = {name: torch.stack([(one[name] - base[name]).float().double() for one in experts]) for name in base}
    raw = {name: torch.full((len(experts),), start, dtype=torch.float64, requires_grad=True) for name in base}
    share, optimizer, entropies = torch.tensor(weights, dtype=torch.float64), torch.optim.Adam(raw.values(), lr), []
    for step in range(steps):
        merged = {
            name: base[name] + torch.einsum("t,t...->...", share * raw[name].clamp(0, 1), tau)
            for name, tau in taus.items()
        }
        loss = torch.zeros((), dtype=torch.float64)
        for batch in batches(step):
            logits = functional_call(model, merged, (batch,))
            loss = loss + torch.distributions.Categorical(logits=logits).entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        entropies.append(loss.item())
    return {name: one.detach().clamp(0, 1) for name, one in raw.items()}, entropies
