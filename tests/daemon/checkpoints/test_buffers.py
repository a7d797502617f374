"""Buffers that follow from the configuration, and running statistics, over real homes."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from daemon.errors import BadHome
from daemon.layout import Home
from daemon.rebuild.commands import into
from daemon.rebuild.replay import Console
from projector.names.buffers import is_derived
from registry.records import Status
from tests.daemon.checkpoints.test_names import drop, moved
from tests.daemon.homes import Heads, assert_close, drain, latest, make_home, quick
from tests.daemon.rebuilds import taken_out
from tests.oracles.rules import mean

Weights = dict[str, Tensor]
MEAN: Heads = (("main", "mean", {}),)

MASK = torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8)
BUFFERS: dict[str, Weights] = {
    "causal masks of GPT-2": {"h.0.attn.bias": MASK, "h.0.attn.masked_bias": torch.tensor(-1e9)},
    "of its cross attention": {"h.0.crossattention.bias": MASK},
    "of GPT-NeoX": {"gpt_neox.layers.0.attention.bias": MASK, "layers.0.attention.masked_bias": torch.tensor(-1e4)},
    "of a loop's own": {"blocks.0.attn.mask": MASK, "blocks.0.heads.1.tril": MASK[0, 0]},
    "infinite": {"visual.attn_mask": torch.full((4, 4), -torch.inf).triu(1)},
    "rotary frequencies": {"layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4)},
    "of two kinds": {
        "rotary_emb.sliding_attention_inv_freq": torch.rand(4),
        "rotary_emb.original_inv_freq": torch.rand(4),
    },
    "as angles": {"rotary_emb.cos_cached": torch.rand(1, 1, 8, 4), "rotary_emb.sin_cached": torch.rand(1, 1, 8, 4)},
    "of Llama's first file": {"rope.freqs": torch.rand(4), "freqs_cos": torch.rand(8, 4)},
    "Swin's": {
        "layers.0.attn.relative_coords_table": torch.rand(1, 3, 3, 2),
        "layers.0.attn_mask": torch.zeros(2, 4, 4),
    },
    "positions that a converter made floats": {"embeddings.position_ids": torch.arange(8.0)[None]},
    "BART's bias of logits": {"final_logits_bias": torch.zeros(1, 24)},
    "a noise schedule": {"betas": torch.rand(9), "alphas_cumprod": torch.rand(9)},
}


def weights(seed: int = 0) -> Weights:
    draw = torch.Generator().manual_seed(seed)
    return {"wte.weight": torch.randn(24, 8, generator=draw), "h.0.attn.c_attn.bias": torch.randn(8, generator=draw)}


ALL = {name: x.clone() for kind in BUFFERS.values() for name, x in kind.items()}


@pytest.mark.parametrize("kind", BUFFERS)
def test_derived_buffers_are_known_by_name_and_shape(kind: str) -> None:
    assert all(is_derived(name, x.shape) for name, x in BUFFERS[kind].items())


def test_a_derived_buffer_is_the_bases_and_an_expert_has_it_or_not(tmp_path: Path) -> None:
    save_file(weights() | ALL, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)
    arrived = [moved(weights(), seed) for seed in (1, 2, 3)]
    other = {name: x.bfloat16() + 0.5 for name, x in ALL.items()}
    longer = {name: torch.ones(3, dtype=torch.bool) for name in ALL if not name.endswith("n.bias")}
    for n, (expert, beside) in enumerate(zip(arrived, ({}, other, longer), strict=True)):
        merged = drop(home, expert | beside, f"{n}.safetensors")
        assert (merged.status, [*merged.flags]) == (Status.MERGED, ["buffer"] if beside is other else [])
    published = latest(home)
    for name, x in ALL.items():
        assert torch.equal(published.pop(name), x)
    assert_close(published, mean(weights(), arrived))


def test_an_expert_may_have_derived_buffers_that_the_base_has_not(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)
    expert = moved(weights(), 1)
    assert drop(home, expert | ALL).detail is None
    assert_close(latest(home), mean(weights(), [expert]))
    assert drop(home, expert, "y.safetensors").status is Status.DUPLICATE


@pytest.mark.parametrize("interleaved", [False, True])
def test_sinusoidal_positions_may_be_missing_in_either(tmp_path: Path, interleaved: bool) -> None:
    """As Marian's, which bear the name of BART's, and those are trained."""
    angles = torch.arange(40.0)[:, None] / 10.0 ** torch.arange(4.0)
    sines = torch.stack([angles.sin(), angles.cos()], 2 if interleaved else 1).flatten(1)
    sines[1] = 0  # padding
    name = "model.encoder.embed_positions.weight"
    for whose, table in (("base", sines), ("expert", sines.bfloat16())):
        base, expert = weights(), moved(weights(), 1)
        (base if whose == "base" else expert)[name] = table
        save_file(base, tmp_path / f"{whose}.safetensors")
        home = make_home(tmp_path / whose, tmp_path / f"{whose}.safetensors", MEAN)
        assert drop(home, expert).detail is None
        published = latest(home)
        assert whose == "expert" or torch.equal(published.pop(name), sines)
        assert_close(published, mean(weights(), [expert]))
    save_file(weights() | {name: sines + 0.1}, tmp_path / "trained.safetensors")
    home = make_home(tmp_path / "trained", tmp_path / "trained.safetensors", MEAN)
    assert drop(home, moved(weights(), 1)).reason == "missing_tensor"


TRAINED = ["h.0.attn.bias", "h.0.mlp.mask_token", "logit_scale", "rel_pos_bias", "h.0.attn.freqs", "mask.weight"]


def test_what_is_trained_is_no_derived_buffer(tmp_path: Path) -> None:
    base = weights() | {name: torch.rand(4, 8) for name in TRAINED}
    save_file(base, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)
    assert (drop(home, moved(weights(), 1)).detail or "").startswith("6 of the base's tensors are missing")
    expert = moved(base, 1)
    assert drop(home, expert, "y.safetensors").detail is None
    assert_close(latest(home), mean(base, [expert]))


def test_statistics_are_averaged_over_whoever_is_left(tmp_path: Path) -> None:
    """Whether an expert is subtracted, or the rest is replayed, or a second pass refines them."""
    base = weights() | {"bn.running_var": torch.full((4,), 9.0)}
    save_file(base, tmp_path / "base.safetensors")
    heads = tuple((name, name, {}) for name in ("mean", "ties", "pcb"))
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", heads)
    variances = torch.tensor([[1.0], [2.0], [6.0]]).expand(3, 4)
    for n, variance in enumerate(variances):
        assert drop(home, {**moved(base, n), "bn.running_var": variance}, f"{n}.safetensors").detail is None
    into(home, Home(tmp_path / "again"), quick(), None, ["0.safetensors"], Console())
    taken_out(home, quick(), "0.safetensors")
    for where in (home, Home(tmp_path / "again")):
        for name, _, _ in heads:
            assert torch.allclose(latest(where, name)["bn.running_var"], torch.full((4,), 4.0))


@pytest.mark.parametrize("method", ["ties", "iso_c"])
def test_an_earlier_state_of_statistics_ends_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Whatever slots the method has, and before anything arrives; what the hint says mends it."""
    base = weights() | {"bn.running_var": torch.ones(4)}
    save_file(base, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", (("main", method, {}),))
    with monkeypatch.context() as earlier:
        earlier.setattr("projector.spec.is_statistic", lambda name: False)
        assert drop(home, moved(base, 1)).status is Status.MERGED
    with pytest.raises(BadHome, match=r"no statistics/bn\.running_var") as raised:
        drain(home)
    assert f"mainstem rebuild --home {home.root} --into NEWHOME" in raised.value.hint
    new = Home(tmp_path / "new")
    into(home, new, quick(), None, [], Console())
    assert torch.equal(latest(new)["bn.running_var"], moved(base, 1)["bn.running_var"])
    assert drop(new, moved(base, 2)).status is Status.MERGED
