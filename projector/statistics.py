"""What an expert can bring beside its weights, computed from its data: a diagonal Fisher, Gram matrices of inputs.

For trainers, and for any torch model: one pass over a data loader, in the memory of the model and of what is
accumulated. A batch is a tensor, or a mapping or a sequence of them, with the examples along the first dimension, on
the model's device; mappings are keyword arguments of the model, sequences positional ones. Save what is returned with
safetensors as fisher.safetensors or gram.safetensors beside the expert's weights.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from projector.errors import BadValues, Reason
from projector.text import shown

__all__ = ["Batch", "fisher_diagonal", "input_grams", "sampled_nll"]

Batch = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


def fisher_diagonal(
    model: nn.Module, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> dict[str, Tensor]:
    """The mean over the examples of the squared gradient of each one's log-likelihood, by name of the weight.

    loss: the negative log-likelihood of ONE example, a scalar, given the model and a batch of one. It decides which
    labels count. The example's own give the empirical Fisher. Labels drawn from the model's own prediction
    (`sampled_nll`) give the Fisher information itself, without bias; the more examples, the less its noise.

    Examples go through the model one by one: the square of a batch's mean gradient would be another quantity, the
    smaller the larger the batch. The model is in evaluation mode meanwhile (no dropout), and frozen weights count too.

    Returns float32 tensors of the shapes of the floating tensors, tied weights once, under their first name. Buffers
    that float, such as the running mean of a BatchNorm, have no gradient: zero. The sums take 8 bytes per parameter
    (float64), on the model's device, one gradient of the model beside them. Raises ValueError where there is no example
    or `loss` gives no scalar, BadValues where a gradient is not finite.

    Matena and Raffel, Merging models with Fisher-weighted averaging, arXiv 2111.09832.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> pairs = [(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.tensor([[1.0], [1.0]]))]
    >>> _ = nn.init.zeros_(model.weight)
    >>> fisher_diagonal(model, pairs, lambda model, pair: (model(pair[0]) - pair[1]).square().sum() / 2)
    {'weight': tensor([[0.5000, 4.5000]])}
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
    total = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in weights.items()}
    count = 0
    with _evaluating(model, weights.values()):
        for example in (example for batch in batches for example in _examples(batch)):
            nll = loss(model, example)
            if nll.numel() != 1:
                raise ValueError(f"loss gives shape {list(nll.shape)} for one example: it must give a scalar")
            gradients = torch.autograd.grad(nll, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.double().square()
            count += 1
    if not count:
        raise ValueError("there is no example: an iterator can be gone through only once")
    fisher = {name: (squares / count).float() for name, squares in total.items()}
    for name, values in fisher.items():
        if not bool(values.isfinite().all()):
            raise BadValues(
                Reason.NOT_FINITE,
                f"the Fisher of {shown(name)} is not finite",
                "compute it on the model in float32, and look for examples whose loss is not finite",
            )
    return fisher | {name: torch.zeros_like(buffer, dtype=torch.float32) for name, buffer in _floating_buffers(model)}


def sampled_nll(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The negative log-likelihood of labels drawn from the model's own prediction, summed over all of them.

    logits: (..., classes), of one example; for a language model (1, tokens, vocabulary). The generator, on the logits'
    device, makes the draw repeatable.
    """
    log_p_LC = logits.flatten(0, -2).log_softmax(-1)
    label_L1 = torch.multinomial(log_p_LC.detach().exp(), 1, generator=generator)
    return -log_p_LC.gather(1, label_L1).sum()


def input_grams(model: nn.Module, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """X'X / rows of the inputs X (rows, n) of every torch.nn.Linear, (n, n) in float64, by the layer's name.

    A row is one vector that the layer is applied to: a token, say. Those of padding count like any other, so let the
    batches have none. The model is in evaluation mode meanwhile, without gradients.

    Left out are layers that no batch reached through their own call (as the output projection of
    torch.nn.MultiheadAttention) and those whose weight is tied to another tensor. Other layers are not covered; the
    Conv1D of transformers' GPT-2 is no torch.nn.Linear and keeps its weight transposed.
    The sums take 8 n^2 bytes per layer, on the model's device.

    Jin et al., Dataless knowledge fusion by merging weights of language models, arXiv 2212.09849.

    >>> input_grams(nn.Sequential(nn.Linear(2, 1)), [torch.tensor([[1.0, 0.0], [1.0, 2.0]])])
    {'0': tensor([[1., 1.],
            [1., 2.]], dtype=torch.float64)}
    """
    own = dict(model.named_parameters())  # tied weights once
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else kwargs["input"]
        x_RN = x.reshape(-1, x.shape[-1]).double()
        if len(x_RN):  # a mixture's layer may be called for no token at all
            sums.setdefault(name, x_RN.new_zeros(x.shape[-1], x.shape[-1])).addmm_(x_RN.T, x_RN)
            rows[name] = rows.get(name, 0) + len(x_RN)

    hooks = [
        layer.register_forward_pre_hook(partial(add, name), with_kwargs=True)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and f"{name}.weight" in own
    ]
    try:
        with _evaluating(model), torch.no_grad():
            for batch in batches:
                _forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not sums:
        raise ValueError("no torch.nn.Linear within the model was reached: is there a batch?")
    return {name: total / rows[name] for name, total in sums.items()}


@contextmanager
def _evaluating(model: nn.Module, wanted: Iterable[nn.Parameter] = ()) -> Iterator[None]:
    """Evaluation mode, and gradients for the parameters `wanted`; both as before at the end."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [parameter for parameter in wanted if not parameter.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in modes:
            module.training = training


def _examples(batch: Batch) -> Iterator[Batch]:
    """Batches of one."""
    if isinstance(batch, Tensor):
        yield from torch.split(batch, 1)
    elif isinstance(batch, Mapping):
        for parts in zip(*(torch.split(part, 1) for part in batch.values()), strict=True):
            yield dict(zip(batch, parts, strict=True))
    else:
        yield from zip(*(torch.split(part, 1) for part in batch), strict=True)


def _forward(model: nn.Module, batch: Batch) -> None:
    if isinstance(batch, Tensor):
        model(batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*batch)


def _floating_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those that a checkpoint holds."""
    kept = model.state_dict().keys()
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept and buffer.is_floating_point())
