"""Small real models and real PEFT adapters for them, and what the real peft makes of an adapter: the oracle."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from daemon.checkpoints.adapter_config import ADAPTER, ADAPTER_WEIGHTS, read_config
from projector.files.source import Checkpoint
from projector.files.tensorfile import TensorReader
from projector.lora.expert import LoraExpert
from projector.names.naming import SAME, Naming

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

HIDDEN, VOCABULARY = 16, 40


def llama(*, tied: bool = False) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def tied_llama() -> nn.Module:
    return llama(tied=True)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def ctrl() -> nn.Module:
    """Its embedding is called "w", and tied to a head that has a bias of its own."""
    config = transformers.CTRLConfig(vocab_size=VOCABULARY, n_positions=8, n_embd=HIDDEN, dff=24, n_layer=2, n_head=2)
    return transformers.CTRLLMHeadModel(config)


def udop() -> nn.Module:
    """Its embedding has four names, and one of its position biases three; others of them have the same shape."""
    config = transformers.UdopConfig(
        vocab_size=VOCABULARY,
        d_model=HIDDEN,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        max_2d_position_embeddings=12,
        image_size=8,
        patch_size=4,
    )
    return transformers.UdopForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
    )
    return transformers.BertForSequenceClassification(config)


def convolutions() -> nn.Module:
    return nn.ModuleDict(
        {
            "one": nn.Conv1d(3, 5, 3),
            "two": nn.Conv2d(4, 6, (3, 2), bias=False),
            "small": nn.Conv2d(5, 7, 1),
            "three": nn.Conv3d(2, 4, 2),
            "grouped": nn.Conv2d(4, 6, 3, groups=2),
        }
    )


def write(model: Callable[[], nn.Module], folder: Path, *, seed: int = 1) -> Path:
    """The base as one file, float32; a tied weight under its first name only."""
    torch.manual_seed(seed)
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model().state_dict().items():
        if tensor.data_ptr() not in seen:
            tensors[name] = tensor.contiguous()
        seen.add(tensor.data_ptr())
    path = folder / "base.safetensors"
    save_file(tensors, path)
    return path


def train(model: Callable[[], nn.Module], folder: Path, *, seed: int = 1, steps: int = 1, **settings: Any) -> Path:
    """An adapter as peft saves it, as if trained: its weights are drawn at random. `steps` draws others."""
    adapted = trained(model, seed=seed, steps=steps, **settings)
    adapted.save_pretrained(str(folder))
    return folder


def trained(
    model: Callable[[], nn.Module], *, seed: int = 1, steps: int = 1, name: str = "default", **settings: Any
) -> Any:
    """The model with that adapter in it, of this name."""
    torch.manual_seed(seed)
    adapted = peft.get_peft_model(model(), peft.LoraConfig(**settings), name)
    torch.manual_seed(1000 + steps)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted


def merged(model: Callable[[], nn.Module], folder: Path, *, seed: int = 1) -> dict[str, Tensor]:
    """What peft's merge_and_unload() adds to the base, in float64, by the names of the base's file."""
    torch.manual_seed(seed)
    base = model().double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False)
    after = adapted.merge_and_unload().state_dict()
    return {name: after[name] - tensor for name, tensor in before.items() if tensor.is_floating_point()}


@contextmanager
def expert(base: Path, folder: Path, naming: Naming = SAME) -> Iterator[tuple[LoraExpert, Checkpoint]]:
    """The adapter as a source, and the base that it is for."""
    config = read_config(json.loads((folder / ADAPTER).read_bytes()))
    fds = [os.open(path, os.O_RDONLY) for path in (base, folder / ADAPTER_WEIGHTS)]
    try:
        there = Checkpoint([TensorReader(fds[0])])
        yield LoraExpert([TensorReader(fds[1])], {}, config, there, naming), there
    finally:
        for fd in fds:
            os.close(fd)


def deltas(base: Path, folder: Path, *, rows: int | None = None, naming: Naming = SAME) -> dict[str, Tensor]:
    """Every delta, whole or put together from blocks of so many rows."""
    found = {}
    with expert(base, folder, naming) as (source, there):
        for name in source.order:
            spec = there.schema[name]
            starts = range(0, spec.shape[0], rows) if rows and spec.shape else [None]
            blocks = [None if s is None else slice(s, min(s + rows, spec.shape[0])) for s in starts]  # type: ignore[operator]
            parts = [source.delta(spec, there.read(name, b), source.fetch(spec, b)) for b in blocks]
            found[name] = torch.cat(parts) if parts[0].ndim else parts[0]
            assert found[name].dtype == torch.float32 and found[name].shape == spec.shape
    return found


def configure(folder: Path, **fields: Any) -> None:
    """Changes fields of its adapter_config.json."""
    path = folder / ADAPTER
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Changes the tensors of its file."""
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
