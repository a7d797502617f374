"""Models whose modules transformers calls otherwise than their files do, with the settings that the guide gives."""

import json
import re
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.layout import Home
from projector.lora.families import FAMILIES
from registry.records import Status
from tests.adapters import peft, train, transformers
from tests.daemon.homes import assert_close, experts, latest, make_home
from tests.daemon.processes import QUICK, forked

pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

GUIDE = Path(__file__).parents[3] / "docs" / "adapters.md"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def vit() -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(
        # longer than what is drawn for an adapter, as trained weights are
        transformers.ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3, initializer_range=0.2)
    )


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As save_pretrained writes it: by the names of files."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(1)
    vit().save_pretrained(folder)
    return folder


@pytest.fixture
def home(base: Path, tmp_path: Path) -> Home:
    """With the settings of the guide."""
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    home.config.write_text(f"[admission.prefixes]\n{seven()}")
    return home


def merge(home: Home) -> None:
    done = forked("run", "--home", home.root, "--once", "--no-http")
    assert done.returncode == 0, done.stderr
    assert [expert.status for expert in experts(home)] == [Status.MERGED], done.stderr


def published(home: Home) -> dict[str, Tensor]:
    """The weights as transformers loads them, by the names of modules."""
    loaded = transformers.ViTForImageClassification.from_pretrained(home.latest("main"))
    return dict(loaded.state_dict())


def test_an_adapter_by_the_names_of_modules(home: Home, base: Path, tmp_path: Path) -> None:
    settings = {"r": 3, "target_modules": LINEAR, "modules_to_save": ["classifier"]}
    folder = train(vit, tmp_path / "adapter", **settings)
    assert not any("encoder" in name for name in load_file(folder / "adapter_model.safetensors"))
    shutil.copytree(folder, home.inbox / "adapter")
    merge(home)

    tuned = peft.PeftModel.from_pretrained(vit_of(base), str(folder)).merge_and_unload().state_dict()
    assert_close(published(home), tuned)
    before = vit_of(base).state_dict()
    moved = {name.removesuffix(".weight") for name, tensor in tuned.items() if not tensor.equal(before[name])}
    assert {name.rpartition(".")[2] for name in moved} == {*LINEAR, "classifier", "bias"}


def test_the_published_adapter_by_the_names_of_modules(home: Home, base: Path, tmp_path: Path) -> None:
    home.config.write_text(home.config.read_text() + '[heads.main.adapter]\nrank = 16\nnames = "experts"\n')
    train(vit, home.inbox / "adapter", r=3, target_modules=LINEAR)
    merge(home)
    loaded = peft.PeftModel.from_pretrained(vit_of(base), str(home.latest("main") / "adapter"))
    assert_close(loaded.merge_and_unload().state_dict(), published(home))


def test_two_modules_of_one_name_are_refused_at_the_start(home: Home) -> None:
    home.config.write_text(
        '[admission.prefixes]\n"vit.encoder.layer.0.output" = "vit.encoder.layer.1.output"\n'
        '[heads.main.adapter]\nrank = 16\nnames = "experts"\n'
    )
    done = forked("run", "--home", home.root, "--once", "--no-http")
    assert done.returncode != 0 and "would be called vit.encoder.layer.0.output.dense" in done.stderr, done


def test_a_state_dict_by_the_names_of_modules(home: Home, base: Path, tmp_path: Path) -> None:
    model = vit_of(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    done = forked("convert", tmp_path / "trained.pt", home.inbox / "trained.safetensors")
    assert done.returncode == 0, done.stderr
    merge(home)
    assert_close(published(home), dict(model.state_dict()))
    assert latest(home).keys() == load_file(base / "model.safetensors").keys()


def test_without_them_the_refusal_says_how(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    train(vit, home.inbox / "adapter", r=3, target_modules=LINEAR)
    hint = refused(home, home.inbox / "adapter")["hint"]
    (lines,) = re.findall(r"prefixes = \{(.*?)\} under \[admission\]", hint)
    home.config.write_text(f"[admission]\nprefixes = {{{lines}}}\n")
    merge(home)
    home.config.write_text("")
    save_file({n: t.clone() for n, t in vit_of(base).state_dict().items()}, tmp_path / "whole.safetensors")
    assert "admission.prefixes" in refused(home, tmp_path / "whole.safetensors")["hint"]


def test_a_pair_that_leads_nowhere_is_named(home: Home) -> None:
    home.config.write_text(home.config.read_text().replace("attention.attention.query", "attention.qeury"))
    train(vit, home.inbox / "adapter", r=3, target_modules=LINEAR)
    told = refused(home, home.inbox / "adapter")
    assert "vit.encoder.layer.0.attention.qeury.weight, which admission.prefixes makes of it" in told["detail"]
    assert "the base has vit.encoder.layer.0.attention." in told["hint"]


def test_inspect_says_what_became_of_each_name(home: Home, tmp_path: Path) -> None:
    """Two matrices of one shape can be swapped in a table: only who reads it notices."""
    folder = train(vit, tmp_path / "adapter", r=3, target_modules=LINEAR)
    told = json.loads(forked("inspect", folder, "--home", home.root, "--json").stdout)
    ours = "vit.encoder.layer.1.attention.attention.query.weight"
    assert told["renamed"]["vit.layers.1.attention.q_proj.weight"] == ours
    assert len(told["renamed"]) == 2 * len(LINEAR) and told["ignored"] == []
    lines = forked("inspect", folder, "--home", home.root).stdout.splitlines()
    wanted = "vit.layers.*.attention.q_proj.weight -> vit.encoder.layer.*.attention.attention.query.weight"
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("renamed")].count(wanted) == 1


def refused(home: Home, expert: Path) -> dict[str, str]:
    done = forked("inspect", expert, "--home", home.root, "--json")
    told: dict[str, str] = json.loads(done.stdout)
    assert done.returncode == 1 and not told["accepted"]
    return told


SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
PICTURES = {**SIGHT, "image_size": 8, "patch_size": 4}


def deit() -> Any:
    return transformers.DeiTForImageClassification(transformers.DeiTConfig(**PICTURES, num_labels=3))


def dinov2() -> Any:
    shape = {key: PICTURES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size")}
    return transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**shape, patch_size=4, num_labels=3))


def llava() -> Any:
    words = transformers.LlamaConfig(**SIGHT, num_key_value_heads=2, vocab_size=40)
    sight = transformers.CLIPVisionConfig(**PICTURES)
    config = transformers.LlavaConfig(vision_config=sight, text_config=words, image_token_index=39)
    return transformers.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    rope = {"type": "mrope", "mrope_section": [1, 1, 2]}
    words = {**SIGHT, "num_key_value_heads": 2, "vocab_size": 40, "rope_scaling": rope}
    sight = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=words, vision_config=sight)
    )


def row(model: str) -> str:
    """The pairs that the guide's table has for a model."""
    (line,) = (line for line in GUIDE.read_text().splitlines() if line.startswith("| ") and f"`{model}`" in line)
    return "\n".join(re.findall(r'`("[^`]*" = "[^`]*")`', line))


def test_the_guides_pairs_are_those_of_the_hints() -> None:
    for model, pairs in {"vit": seven(), "deit": OTHERS["deit"][1](), "dinov2": OTHERS["dinov2"][1]()}.items():
        assert tomllib.loads(pairs) == FAMILIES[model]


def seven() -> str:
    (table,) = re.findall(r"```toml\n\[admission\.prefixes\]\n(.*?)```", GUIDE.read_text(), re.S)
    return str(table)


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[], str]]] = {
    "deit": (deit, lambda: seven().replace("vit", "deit")),
    "dinov2": (
        dinov2,
        lambda: re.sub(r"vit\.(encoder\.layer|layers)", "dinov2.encoder.layer", "\n".join(seven().splitlines()[:4])),
    ),
    "llava": (llava, lambda: row("llava")),
    "qwen2_vl": (qwen2_vl, lambda: row("qwen2_vl")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_guides_pairs_for_other_models(tmp_path: Path, name: str) -> None:
    """A whole state dict, which has every name of the modules."""
    build, pairs = OTHERS[name]
    torch.manual_seed(1)
    model = build()
    model.save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    home.config.write_text(f"[admission.prefixes]\n{pairs()}\n")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, home.inbox / "x.safetensors")
    merge(home)
    loaded = type(model).from_pretrained(home.latest("main"), dtype=torch.float32)
    assert_close(dict(loaded.state_dict()), dict(model.state_dict()))
    renamed = json.loads(forked("inspect", home.archive(1) / "x.safetensors", "--home", home.root, "--json").stdout)
    assert renamed["renamed"], "it was called otherwise"


def test_following_the_hints_is_enough_where_no_star_is_needed(tmp_path: Path) -> None:
    torch.manual_seed(1)
    llava().save_pretrained(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    folder = train(llava, tmp_path / "adapter", r=3, target_modules=["q_proj", "linear_1", "lm_head"])
    home.config.write_text("[admission.prefixes]\n")
    told: dict[str, str] = {"hint": ""}
    for _ in range(5):
        told = json.loads(forked("inspect", folder, "--home", home.root, "--json").stdout)
        if told["accepted"]:
            break
        (pair,) = re.findall(r'"[^"]*" = "[^"]*"', told["hint"])
        home.config.write_text(home.config.read_text() + pair + "\n")
    shutil.copytree(folder, home.inbox / "adapter")
    merge(home)
    load = transformers.LlavaForConditionalGeneration.from_pretrained
    tuned = peft.PeftModel.from_pretrained(load(tmp_path / "base"), str(folder)).merge_and_unload()
    assert_close(dict(load(home.latest("main")).state_dict()), tuned.state_dict())


def vit_of(base: Path) -> Any:
    return transformers.ViTForImageClassification.from_pretrained(base)
