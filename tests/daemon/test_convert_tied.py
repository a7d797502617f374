"""Tied weights on their way from a pickle into the merged model, with no setting: the pickle knows what is tied."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from daemon.convert.converting import convert
from tests.daemon.homes import MAIN, Heads, assert_close, drain, experts, latest, make_home
from tests.daemon.test_architectures import bert, gpt2, llama, needs_transformers, quiet, t5
from tests.models import read_weights
from tests.oracles import mean

pytestmark = [needs_transformers, quiet, pytest.mark.usefixtures("no_process")]

MEAN: Heads = (("main", "mean", {}),)
HEAD, BIAS = "lm_head.weight", "cls.predictions.decoder.bias"
ALIASES: dict[Callable[[], Any], set[str]] = {
    bert: {"cls.predictions.decoder.weight", BIAS},
    gpt2: {HEAD},
    lambda: llama(tied=True): {HEAD},
    t5: {HEAD, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"},
}


def tuned(model: nn.Module, seed: int, least_axes: int = 0) -> nn.Module:
    """The model with all tensors of so many axes moved; biases that are left out stay zeros."""
    torch.manual_seed(seed)
    other = deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.ndim >= least_axes:
                parameter += 0.01 * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize(("make", "aliases"), ALIASES.items(), ids=["bert", "gpt2", "llama", "t5"])
def test_a_state_dict_that_has_every_name_is_merged(make: Callable[[], Any], aliases: set[str], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "base")
    base = read_weights(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", MEAN)
    states = []
    for n, least_axes in enumerate((2, 0)):
        states.append(tuned(model, n, least_axes).state_dict())
        torch.save(states[-1], tmp_path / "expert.bin")
        assert states[-1].keys() - base.keys() == aliases
        convert(tmp_path / "expert.bin", home.inbox / f"{n}.safetensors")
    drain(home)
    assert [(expert.version, expert.detail) for expert in experts(home)] == [(1, None), (2, None)]
    kept = [{name: state[name] for name in base} for state in states]
    assert_close(latest(home), mean(base, kept))


def test_a_base_that_has_every_name_takes_an_expert_that_has_not(tmp_path: Path) -> None:
    model = bert()
    torch.save(model.state_dict(), tmp_path / "base.bin")
    convert(tmp_path / "base.bin", tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors")
    tuned(model, 1).save_pretrained(home.inbox / "expert")
    drain(home)
    assert [(expert.version, expert.detail) for expert in experts(home)] == [(1, None)]
    merged = latest(home)
    assert torch.equal(merged[BIAS], merged["cls.predictions.bias"]) and merged[BIAS].any()


@pytest.mark.parametrize("name", [BIAS, "cls.predictions.decoder.weight"])
def test_what_is_untied_is_refused(name: str, tmp_path: Path) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", MAIN)
    state = tuned(model, 1).state_dict()
    torch.save({**state, name: state[name] + 1}, tmp_path / "expert.bin")
    convert(tmp_path / "expert.bin", home.inbox / "expert.safetensors")
    drain(home)
    (expert,) = experts(home)
    assert expert.reason == "unexpected_tensor" and name in (expert.detail or "")
