"""For the command of `mainstem rebuild --adamerging`: runs the merged model, and answers with the entropy's gradient.

    answer(model, logits)

It needs torch and safetensors alone, so that this one file can be copied to where models run. docs/adamerging.md has it
in use, and the lines that are exchanged.
"""

import json
import sys
from collections.abc import Callable, Iterable

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


def answer(model: nn.Module, logits: Callable[[int], Iterable[Tensor]]) -> None:
    """Answers until nothing more is asked.

    model: has the base's names, and is what `logits` runs; its own weights are written over. logits: given the number
    of the step, from 0, the logits (..., classes) of one unlabelled batch of each task, one after the other, each from
    a forward pass of its own. What is printed meanwhile goes to standard error. Raises ValueError.
    """
    answers, sys.stdout = sys.stdout, sys.stderr  # where a print() would be taken for an answer
    for line in sys.stdin:
        asked = json.loads(line)
        weights = _load(model, asked["weights"])
        total, batches = 0.0, 0
        for batch in logits(asked["step"]):
            loss = entropy(batch)
            loss.backward(inputs=list(weights.values()))  # type: ignore[no-untyped-call]
            total, batches = total + loss.item(), batches + 1
        if not batches:
            raise ValueError("there is no batch: logits(step) gave nothing")
        gradients = {name: one.grad.contiguous().cpu() for name, one in weights.items() if one.grad is not None}
        save_file(gradients, asked["gradients"])
        print(json.dumps({"entropy": total}), file=answers, flush=True)


def entropy(logits: Tensor) -> Tensor:
    """The mean Shannon entropy, in nats, of the softmax of logits (..., classes), in float32 or better."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -(wide.softmax(-1) * wide.log_softmax(-1)).sum(-1).mean()


def _load(model: nn.Module, path: str) -> dict[str, nn.Parameter]:
    """Puts the weights in `path` into the model; the parameters among them, each once, with no gradient yet."""
    own, found, lacking = model.state_dict(keep_vars=True), dict[int, tuple[str, nn.Parameter]](), []
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            if name not in own:
                lacking.append(name)
                continue
            own[name].copy_(file.get_tensor(name))
            if isinstance(own[name], nn.Parameter):
                found.setdefault(id(own[name]), (name, own[name]))
    if not found:
        raise ValueError(f"the model has no parameter {lacking[0]!r}: give `answer` the module with the base's names")
    for _, one in found.values():
        one.requires_grad_(True)
        one.grad = None
    return dict(found.values())
