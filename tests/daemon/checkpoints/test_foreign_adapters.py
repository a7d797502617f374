"""LoRA adapters of other tools: recognised by name, and merged once what the hint says is done. The oracle is peft,
with the same factors."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from daemon.checkpoints.adapter_config import ADAPTER, ADAPTER_WEIGHTS
from daemon.checkpoints.checkpoint import open_path
from daemon.checkpoints.hints import hinting
from daemon.cli.app import app
from daemon.convert.adapters import How, convert_adapter, weights_of
from daemon.errors import BadHome, Reason, Refused
from projector.errors import BadSchema
from tests.adapters import configure, convolutions, llama, merged, train, write
from tests.daemon.homes import drain, experts, latest, make_home

pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "embed_tokens"]}
LINEAR: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
State = dict[str, Tensor]


def bare(folder: Path) -> State:
    """The factors by module, `X.A` and `X.B`, as peft saved them."""
    found = {}
    for name, tensor in load_file(folder / ADAPTER_WEIGHTS).items():
        if match := re.fullmatch(r"base_model\.model\.(.*)\.lora_(?:embedding_)?([AB])(?:\.weight)?", name):
            found[f"{match[1]}.{match[2]}"] = tensor
    return found


def ends(state: State, a: str, b: str, change: Callable[[str], str] = str) -> State:
    """With other ends of the names, and other modules."""
    return {change(name[:-2]) + (a if name.endswith("A") else b): tensor for name, tensor in state.items()}


def mlx(folder: Path, state: State) -> None:
    save_file(
        {n: t.T.contiguous() for n, t in ends(state, ".lora_a", ".lora_b").items()}, folder / "adapters.safetensors"
    )
    shutil.copy(folder / "adapters.safetensors", folder / "0000100_adapters.safetensors")
    parameters = {"rank": 4, "dropout": 0.0, "scale": 2.0}
    (folder / ADAPTER).write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters})
    )


def torchtune(folder: Path, state: State) -> None:
    save_file(ends(state, ".lora_a.weight", ".lora_b.weight"), folder / "model.safetensors")


def kohya(folder: Path, state: State) -> None:
    named = ends(state, ".lora_down.weight", ".lora_up.weight", lambda module: "lora_unet_" + module.replace(".", "_"))
    alphas = {n.replace(".lora_down.weight", ".alpha"): torch.tensor(8.0) for n in named if ".lora_down" in n}
    save_file(named | alphas, folder / "french.safetensors")


def diffusers(folder: Path, state: State) -> None:
    named = ends(state, ".lora.down.weight", ".lora.up.weight", lambda module: f"unet.{module}")
    save_file(named, folder / "pytorch_lora_weights.safetensors")


def diffusers_peft(folder: Path, state: State) -> None:
    named = ends(state, ".lora_A.weight", ".lora_B.weight", lambda module: f"transformer.{module}")
    save_file(named, folder / "pytorch_lora_weights.safetensors")


def diffusers_noted(folder: Path, state: State) -> None:
    """As diffusers writes it since 0.34, with peft's config in the header."""
    diffusers_peft(folder, state)
    file = folder / "pytorch_lora_weights.safetensors"
    noted = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": LINEAR["target_modules"]}
    save_file(load_file(file), file, metadata={"lora_adapter_metadata": json.dumps(noted)})


WAYS: dict[str, tuple[Callable[[Path, State], None], dict[str, Any], str]] = {
    "mlx-lm": (mlx, SETTINGS, "mainstem convert DROP NEW"),
    "torchtune": (torchtune, LINEAR, "mainstem convert DROP/model.safetensors NEW --alpha N"),
    "sd-scripts": (kohya, LINEAR, "mainstem convert DROP/french.safetensors NEW --base HOME/state/base"),
    "diffusers": (diffusers, LINEAR, "mainstem convert DROP/pytorch_lora_weights.safetensors NEW --alpha N"),
    "diffusers, peft": (diffusers_peft, LINEAR, "mainstem convert DROP/pytorch_lora_weights.safetensors NEW --alpha N"),
    "diffusers, noted": (
        diffusers_noted,
        LINEAR,
        "mainstem convert DROP/pytorch_lora_weights.safetensors NEW --alpha N",
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(llama, tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("way", WAYS)
def test_the_hint_makes_it_merge(tmp_path: Path, base: Path, way: str) -> None:
    save, settings, command = WAYS[way]
    plain = train(llama, tmp_path / "plain", **settings)
    wanted = {name: delta + load_file(base)[name] for name, delta in merged(llama, plain).items()}
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    dropped = home.inbox / "french"
    dropped.mkdir()
    save(dropped, bare(plain))
    drain(home)
    (refused,) = experts(home)
    assert refused.reason == "adapter" and way.partition(",")[0] in (refused.detail or "")
    there = home.quarantine(refused.id) / "french"
    for word, meant in {"DROP": there, "NEW": home.inbox / "french", "HOME": home.root}.items():
        command = command.replace(word, str(meant))
    assert command in (refused.hint or ""), refused.hint
    done = CliRunner().invoke(app, command.replace("--alpha N", "--alpha 8").split()[1:])
    assert done.exit_code == 0, done.output
    drain(home)
    assert experts(home)[-1].status == "merged", experts(home)[-1].detail
    found = latest(home)
    assert all((found[name] - wanted[name]).abs().max() < 1e-6 for name in found)


def converted(tmp_path: Path, state: State, **how: Any) -> Path:
    save_file(state, tmp_path / "theirs.safetensors")
    convert_adapter(tmp_path / "theirs.safetensors", tmp_path / "out", How(**how))
    return tmp_path / "out"


def test_ranks_and_alphas_differ_by_module(tmp_path: Path, base: Path) -> None:
    """sd-scripts: a scale of each module's own; without one, or at 0, alpha is the rank."""
    settings = {
        **LINEAR,
        "rank_pattern": {"layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"layers.1.mlp.down_proj": 3},
    }
    plain = train(llama, tmp_path / "plain", **settings)
    configure(
        plain,
        alpha_pattern={"layers.1.mlp.down_proj": 3, "layers.0.self_attn.q_proj": 2, "layers.1.self_attn.q_proj": 4},
    )
    kohya(tmp_path, bare(plain))
    state = load_file(tmp_path / "french.safetensors")
    state["lora_unet_model_layers_1_mlp_down_proj.alpha"].fill_(3)
    state["lora_unet_model_layers_0_self_attn_q_proj.alpha"].fill_(0)
    del state["lora_unet_model_layers_1_self_attn_q_proj.alpha"]
    out = converted(tmp_path, state, base=base)
    assert load_file(out / ADAPTER_WEIGHTS).keys() == load_file(plain / ADAPTER_WEIGHTS).keys()
    wanted = merged(llama, plain)
    for name, delta in merged(llama, out).items():
        assert torch.equal(delta, wanted[name])


def test_convolutions_and_old_names_of_attention(tmp_path: Path) -> None:
    plain = train(convolutions, tmp_path / "plain", r=2, lora_alpha=3, target_modules=["two", "small"])
    named = ends(bare(plain), ".lora.down.weight", ".lora.up.weight", lambda module: f"unet.{module}")
    wanted = merged(convolutions, plain)
    found = merged(convolutions, converted(tmp_path, named, alpha=3.0))
    assert all(torch.equal(delta, wanted[name]) for name, delta in found.items())
    old = {f"unet.a.processor.to_{w}_lora.{e}.weight": torch.ones(2, 2) for w in ("q", "out") for e in ("up", "down")}
    shutil.rmtree(tmp_path / "out")
    names = load_file(converted(tmp_path, old, alpha=2.0) / ADAPTER_WEIGHTS).keys()
    assert {f"base_model.model.a.{w}.lora_{p}.weight" for w in ("to_q", "to_out.0") for p in "AB"} == names


def factors(module: str, a: str, b: str) -> State:
    return {f"{module}.{a}.weight": torch.ones(2, 16), f"{module}.{b}.weight": torch.ones(16, 2)}


ONE = factors("model.layers.0.self_attn.q_proj", "lora_a", "lora_b")
UNET = factors("unet.q", "lora.down", "lora.up")
TEXT = factors("text_encoder.q", "lora.down", "lora.up")
FLAT = factors("lora_unet_a_b_c", "lora_down", "lora_up")
NOT: dict[str, tuple[State, dict[str, Any], str, str]] = {
    "without its alpha": (ONE, {}, "how its LoRA of model.layers.0.self_attn.q_proj is scaled", "--alpha N"),
    "for several models": (
        UNET | TEXT,
        {"alpha": 2.0},
        r"several models: text_encoder\., unet\.",
        "--only text_encoder.",
    ),
    "nothing of that one": (UNET, {"alpha": 2.0, "only": "prior."}, "begins with prior", "--only"),
    "half a module": (dict([next(iter(UNET.items()))]), {"alpha": 2.0}, "only one of its two", "the whole file"),
    "more than LoRA": (UNET | {"unet.q.dora_scale": torch.ones(16)}, {"alpha": 2.0}, "dora_scale", "fuse_lora"),
    "stacked experts": (
        {"e.lora_a": torch.ones(3, 2, 4), "e.lora_b": torch.ones(3, 4, 2)},
        {},
        "no LoRA of one layer|is not beside it",
        "",
    ),
    "underscores without a base": (FLAT, {}, "underscores for dots", "--base, with"),
    "a whole model": ({"weight": torch.ones(2, 2)}, {}, "no adapter of another tool", "as it is"),
    "torchtune's own names": (
        {name.replace("self_attn", "attn"): tensor for name, tensor in ONE.items()},
        {"alpha": 2.0},
        "q and k lie in another order",
        "FullModelHFCheckpointer",
    ),
    "NeMo": ({"decoder.layers.0.mlp.adapter.linear_in.weight": torch.ones(2, 2)}, {}, "NeMo or Megatron", "hf-peft"),
    "LyCORIS": ({"lora_unet_q.hada_w1_a": torch.ones(2, 2)}, {}, "LyCORIS", "fuse_lora"),
    "LoHa of peft": ({"base_model.model.q.ia3_l": torch.ones(2, 1)}, {}, "another kind than LoRA", "merge_and_unload"),
}


@pytest.mark.parametrize("case", NOT)
def test_what_would_have_to_be_guessed_is_refused(tmp_path: Path, case: str) -> None:
    state, how, words, hint = NOT[case]
    with pytest.raises((Refused, BadSchema), match=words) as caught:
        converted(tmp_path, state, **how)
    assert hint in caught.value.hint and list(tmp_path.iterdir()) == [tmp_path / "theirs.safetensors"]


def test_which_of_two_models_is_said(tmp_path: Path) -> None:
    out = converted(tmp_path, UNET | TEXT, alpha=2.0, only="unet.")
    assert load_file(out / ADAPTER_WEIGHTS).keys() == {f"base_model.model.q.lora_{part}.weight" for part in "AB"}


def test_a_module_that_could_be_two(tmp_path: Path) -> None:
    model = {name: torch.ones(4, 4) for name in ("a.b_c.weight", "a_b.c.weight")}
    save_file(model, tmp_path / "base.safetensors")
    with pytest.raises(BadSchema, match=r"a_b_c could be a\.b_c, a_b\.c"):
        converted(tmp_path, FLAT, base=tmp_path / "base.safetensors")
    with pytest.raises(BadSchema, match="no module x"):
        converted(tmp_path, {n.replace("a_b_c", "x"): t for n, t in FLAT.items()}, base=tmp_path / "base.safetensors")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fine_tune_type": "dora"}, "fine_tune_type is dora"),
        ({"lora_parameters": {"rank": 4, "alpha": 16, "scale": 10.0}}, "an alpha, which not every version"),
        ({"lora_parameters": {"rank": 4}}, "not beside it"),
    ],
)
def test_mlx_configs_that_say_something_else(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    mlx(folder, {"q.A": torch.ones(4, 8), "q.B": torch.ones(8, 4)})
    configure(folder, **change)
    with pytest.raises(Refused, match=words):
        convert_adapter(folder, tmp_path / "out", How())


def test_mlx_under_pefts_file_name(tmp_path: Path) -> None:
    folder = tmp_path / "mlx"
    folder.mkdir()
    mlx(folder, {"q.A": torch.ones(4, 8), "q.B": torch.ones(8, 4)})
    (folder / "adapters.safetensors").rename(folder / ADAPTER_WEIGHTS)
    (folder / "0000100_adapters.safetensors").unlink()
    with pytest.raises(Refused, match="it is mlx-lm's") as caught, hinting(folder), open_path(folder):
        pass
    assert caught.value.reason is Reason.ADAPTER and f"mainstem convert {folder} mlx-2" in caught.value.hint
    convert_adapter(folder, tmp_path / "out", How())
    with open_path(tmp_path / "out") as opened:
        assert opened.kind == "adapter"


def test_a_model_with_gates_of_its_own_is_not_taken_for_an_adapter(tmp_path: Path) -> None:
    """GPT-2 begins with transformer. too, and a model may call a weight alpha."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.ModuleDict({"h": nn.ModuleList([nn.Linear(3, 3)])})
            self.gate = nn.ParameterDict({"alpha": nn.Parameter(torch.ones(1))})

    base = write(Plain, tmp_path)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    save_file({name: tensor + 0.1 for name, tensor in load_file(base).items()}, home.inbox / "one.safetensors")
    drain(home)
    assert experts(home)[0].status == "merged"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "adapter_model.bin"])
def test_a_folder_of_pickles_is_none_of_these(tmp_path: Path, name: str) -> None:
    """Whatever lies beside them: a Fisher sidecar, what a trainer kept."""
    for there in (name, "fisher.safetensors"):
        (tmp_path / there).write_bytes(b"")
    assert weights_of(tmp_path) is None
    (tmp_path / name).unlink()
    assert weights_of(tmp_path) == tmp_path / "fisher.safetensors"


@pytest.mark.parametrize("state", [ONE, UNET, FLAT], ids=["torchtune", "diffusers", "sd-scripts"])
def test_they_are_no_base(tmp_path: Path, state: State) -> None:
    save_file(state, tmp_path / "base.safetensors")
    with pytest.raises(BadHome, match="an adapter, not a model"):
        make_home(tmp_path / "home", tmp_path / "base.safetensors")
