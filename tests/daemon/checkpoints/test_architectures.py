"""Small real models of many architectures: a base, three experts of their own training, merged, loaded back, compared.

The daemon knows no architecture: names and shapes are all that it sees. Two heads judge it: `main` is the plain mean,
compared with the mean taken of the models' own parameters in memory; `stem` is OPCM, compared with the plain
implementation in tests/oracles/rules.py on the tensors of the files.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from daemon.layout import Home
from tests.daemon.homes import Heads, assert_close, drain, experts, latest, make_home
from tests.oracles.rules import mean, opcm

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
quiet = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the library's own warnings

HEADS: Heads = (("main", "mean", {}), ("stem", "opcm", {}))
EXPERTS = 3
WEIGHTS = "model.safetensors"
WORDS, PLACES = 50, 12  # the vocabulary, the length of a text

Batch = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """How to make the model anew, how to draw one batch that it can learn from, and which output to compare."""

    model: Callable[[], Any]
    batch: Callable[[], Batch]
    output: str = "logits"


def words() -> Batch:
    ids = torch.randint(3, WORDS, (4, PLACES))
    return {"input_ids": ids, "labels": ids}


def pictures() -> Batch:
    return {"pixel_values": torch.randn(4, 3, 8, 8), "labels": torch.randint(0, 3, (4,))}


def captions() -> Batch:
    return {"input_ids": words()["input_ids"], "pixel_values": pictures()["pixel_values"], "return_loss": True}


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    small = BertConfig(
        vocab_size=WORDS, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return BertForMaskedLM(small)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(**text(), num_key_value_heads=1, tie_word_embeddings=tied)
    return LlamaForCausalLM(small).to(dtype)


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**text(), num_key_value_heads=1, num_local_experts=4))


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    small = GptOssConfig(
        **text(), num_key_value_heads=1, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8
    )
    return GptOssForCausalLM(small)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    small = T5Config(vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(small)


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    reading = {"vocab_size": WORDS, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1}
    seeing = {"image_size": 8, "patch_size": 4}
    small = CLIPConfig(text_config={**shape, **reading}, vision_config={**shape, **seeing}, projection_dim=8)
    return CLIPModel(small)


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4, num_labels=3))


def text() -> dict[str, Any]:
    """What the configurations of the language models have in common."""
    return {
        "vocab_size": WORDS,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


ARCHITECTURES = {
    "bert": Architecture(bert, words),
    "gpt2": Architecture(gpt2, words),
    "llama": Architecture(llama, words),
    "llama-tied": Architecture(lambda: llama(tied=True), words),
    "t5": Architecture(t5, words),
    "clip": Architecture(clip, captions, "logits_per_image"),
    "vit": Architecture(vit, pictures),
    "mixtral": Architecture(mixtral, words),
    "gpt-oss": Architecture(gpt_oss, words),
}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@dataclass(frozen=True)
class Trained:
    """A base and its experts: the folders that save_pretrained wrote, and the parameters as they were in memory."""

    base: Path
    folders: list[Path]
    theta0: Mapping[str, Tensor]
    thetas: list[Mapping[str, Tensor]]


def train(architecture: Architecture, root: Path) -> Trained:
    """Saves the base as it is initialised, and fine-tunes it three times, each time on data of its own."""
    torch.manual_seed(0)
    model = architecture.model()
    model.save_pretrained(root / "base")
    theta0, thetas, folders = parameters(model), [], []
    for n in range(1, EXPERTS + 1):
        torch.manual_seed(n)
        expert = type(model).from_pretrained(root / "base").train()
        learn(expert, lambda model: model(**architecture.batch()).loss)
        thetas.append(parameters(expert))
        folders.append(root / f"expert-{n}")
        expert.save_pretrained(folders[-1])
    return Trained(root / "base", folders, theta0, thetas)


def learn(model: nn.Module, loss: Callable[[Any], Tensor]) -> None:
    """Real steps of a real optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward(loss(model))
        optimizer.step()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under one name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def merged_home(root: Path, base: Path, dropped: list[Path]) -> Home:
    """A home that has taken these experts."""
    home = make_home(root, base, HEADS)
    for path in dropped:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, home.inbox / path.name)
    drain(home)
    assert [(expert.version, expert.detail) for expert in experts(home)] == [(n, None) for n in (1, 2, 3)]
    return home


def loaded(model: type, folder: Path) -> Any:
    """The model in the folder; nothing may be missing, unexpected or of another shape."""
    found, about = model.from_pretrained(folder, output_loading_info=True)  # type: ignore[attr-defined]
    assert not any(about.values()), about
    return found.eval()


def answer(architecture: Architecture, model: Any) -> Tensor:
    """What it makes of a batch that nobody trained on."""
    torch.manual_seed(99)
    with torch.no_grad():
        found: Tensor = model(**architecture.batch())[architecture.output]
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@needs_transformers
@quiet
def test_what_is_published_is_the_model_that_the_formula_makes(architecture: Architecture, tmp_path: Path) -> None:
    trained = train(architecture, tmp_path)
    home = merged_home(tmp_path / "home", trained.base, trained.folders)

    model = type(architecture.model())
    published = loaded(model, home.latest("main"))
    in_memory = architecture.model().eval()
    for name, parameter in in_memory.named_parameters():
        parameter.data.copy_(mean(trained.theta0, trained.thetas)[name])
    unlike = answer(architecture, loaded(model, trained.base))
    for wanted, found in [
        (answer(architecture, in_memory), answer(architecture, published)),
        (
            answer(architecture, projected(model, trained, tmp_path)),
            answer(architecture, loaded(model, home.latest("stem"))),
        ),
    ]:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert (found - unlike).abs().max() > 1e-3  # it did learn: the base would not pass for it


def projected(model: type, trained: Trained, tmp_path: Path) -> Any:
    """The model that OPCM makes of the experts' files, by the oracle."""
    weights = opcm(stored(trained.base), [stored(folder) for folder in trained.folders])
    folder = shutil.copytree(trained.base, tmp_path / "oracle")
    save_file({name: tensor.float() for name, tensor in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
    return loaded(model, folder)


@needs_transformers
@quiet
def test_a_mixture_of_experts_is_stored_both_ways(tmp_path: Path) -> None:
    """Lest the tests above stop to cover matrices and stacks of them, should the library change how it saves."""
    for architecture, axes in ((mixtral, 2), (gpt_oss, 3)):
        architecture().save_pretrained(tmp_path / str(axes))
        inner = {name: tensor for name, tensor in stored(tmp_path / str(axes)).items() if ".experts." in name}
        assert max(tensor.ndim for tensor in inner.values()) == axes


class Plain(nn.Module):
    """No library's: convolutions, batch norm with its buffers, a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten())
        self.told = nn.Linear(6 * 36, 3)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, pictures: Tensor) -> Tensor:
        found: Tensor = self.told(self.seen(pictures)) * self.scale
        return found


def test_a_plain_state_dict_in_one_file(tmp_path: Path) -> None:
    def loss(model: Any) -> Tensor:
        batch = pictures()
        return nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])

    torch.manual_seed(0)
    base = Plain()
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    states = []
    for n in range(1, EXPERTS + 1):
        torch.manual_seed(n)
        expert = Plain()
        expert.load_state_dict(base.state_dict())
        learn(expert.train(), loss)
        states.append(expert.state_dict())
        save_file(states[-1], tmp_path / f"{n}.safetensors")
    home = merged_home(
        tmp_path / "home", tmp_path / "base.safetensors", [tmp_path / f"{n}.safetensors" for n in (1, 2, 3)]
    )
    assert states[0]["seen.1.num_batches_tracked"] == 3 and states[0]["scale"].ndim == 0

    averaged = mean(base.state_dict(), states)  # as running statistics are by every method
    start, *moved = ({n: x for n, x in one.items() if ".running_" not in n} for one in (base.state_dict(), *states))
    for head, wanted in [("main", averaged), ("stem", averaged | opcm(start, moved))]:
        assert_close(latest(home, head), wanted)
        published, in_memory = Plain().eval(), Plain().eval()
        published.load_state_dict(latest(home, head))
        in_memory.load_state_dict(wanted)
        assert published.seen[1].num_batches_tracked == 0  # it does not float: the base's
        torch.manual_seed(99)
        unseen = pictures()["pixel_values"]
        torch.testing.assert_close(published(unseen), in_memory(unseen), rtol=1e-5, atol=1e-6)
