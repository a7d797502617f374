"""Models whose modules transformers calls otherwise than their files do, with the settings that the guide gives."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from daemon.home import Home
from registry.records import Status
from tests.adapters import peft, train, transformers
from tests.daemon.homes import assert_close, experts, latest, make_home
from tests.daemon.processes import mainstem

pytestmark = pytest.mark.filterwarnings("default")  # the libraries' own

GUIDE = Path(__file__).parents[2] / "docs" / "adapters.md"
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]


def vit() -> Any:
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3)
    )


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
    (table,) = re.findall(r"```toml\n(\[admission\.prefixes\]\n.*?)```", GUIDE.read_text(), re.S)
    home.config.write_text(table)
    return home


def merge(home: Home) -> None:
    done = mainstem("run", "--home", home.root, "--once", "--no-http")
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
    done = mainstem("run", "--home", home.root, "--once", "--no-http")
    assert done.returncode != 0 and "would be called vit.encoder.layer.0.output.dense" in done.stderr, done


def test_a_state_dict_by_the_names_of_modules(home: Home, base: Path, tmp_path: Path) -> None:
    model = vit_of(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(model.state_dict(), tmp_path / "trained.pt")
    done = mainstem("convert", tmp_path / "trained.pt", home.inbox / "trained.safetensors")
    assert done.returncode == 0, done.stderr
    merge(home)
    assert_close(published(home), dict(model.state_dict()))
    assert latest(home).keys() == load_file(base / "model.safetensors").keys()


def test_without_them_the_refusal_says_how(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    train(vit, home.inbox / "adapter", r=3, target_modules=LINEAR)
    done = mainstem("inspect", home.inbox / "adapter", "--home", home.root)
    assert done.returncode != 0 and "[admission.prefixes]" in done.stderr + done.stdout, done


def vit_of(base: Path) -> Any:
    return transformers.ViTForImageClassification.from_pretrained(base)
