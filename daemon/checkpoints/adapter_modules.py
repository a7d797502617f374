"""Which tensors of a model a LoRA adapter can move, under which names, and what its adapter_config.json says.

Everything is decided from the base's names, shapes and config.json: no library of models is asked.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from projector.algebra.low_rank import LowRank
from projector.spec import Schema, TensorSpec

PREFIX = "base_model.model."
EMBEDDINGS = (
    *("embed", "embed_tokens", "tokens_embed", "embed_positions", "embed_in", "wte", "wpe", "shared"),
    *("*embedding", "*embeddings", "relative_attention_bias"),
)
"""Globs for the last part of the name of a module that is an embedding."""
OF_TOKENS = (
    *("embed_tokens", "tokens_embed", "embed_in", "wte", "shared", "word_embeddings"),
    *("tok_embeddings", "embeddings", "word_embedding"),
)
"""Those of them whose tensor is often the output layer's too."""
OWN_NAME = {"ctrl": "w"}  # model type -> what it alone calls such an embedding
SHARED_BIASES = ("udop",)  # model types that share one relative attention bias among modules of several names
NOT_LINEAR = ("gate", "router")  # of mixtures of experts: a class of their own in some models, which peft refuses
TRANSPOSED_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"}
TRANSPOSED = ("c_attn", "c_proj", "c_fc", "q_attn")  # the modules of those that keep (in, out), as Conv1D does
WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # architectures with an output layer
ROOTS = ("model", "transformer", "backbone", "shared", "led")
"""The first part of the names of models whose output layer, tied to the embedding, is called `lm_head`."""
WITH_UNKNOWN_HEAD = (  # whose name is another in each of them
    *("ForMaskedLM", "ForPreTraining"),
    *("WithLMHeadModel", "XLNetLMHeadModel", "T5GemmaForConditionalGeneration"),
)
WITH_OUTPUT = (*WITH_HEAD, *WITH_UNKNOWN_HEAD, "DoubleHeadsModel")
WITHOUT_OUTPUT = ("ElectraForPreTraining",)
BARE = ("Model", "Classification", "QuestionAnswering", "MultipleChoice")
OUTPUTS = ("lm_head", "embed_out", "output_projection", "proj_out", "decoder", "output")
"""What an output layer is called where its matrix is stored."""
COMPOSITE = "EncoderDecoderModel"  # of two models: whether either is tied stands in the config of that part


@dataclass(frozen=True)
class Module:
    """One module that gets a LoRA: its path in the model, the tensor it moves, and how that lies in it.

    turned: the tensor is (in, out), or an embedding's; else (out, in).
    """

    path: str
    spec: TensorSpec
    embedding: bool
    turned: bool

    def rank(self, wanted: int) -> int:
        """Never more than the smaller side."""
        return min(wanted, *self.spec.shape)

    def specs(self, wanted: int) -> list[TensorSpec]:
        """Its two factors in the adapter's file, A (r, in) before B (out, r)."""
        rank, (m, n) = self.rank(wanted), self.spec.shape
        first, second = self._names()
        shape_in, shape_out = (m, n) if self.turned else (n, m)
        return [
            TensorSpec(first, (rank, shape_in), torch.float32),
            TensorSpec(second, (shape_out, rank), torch.float32),
        ]

    def factors(self, found: LowRank, wanted: int) -> Mapping[str, Tensor]:
        """By name; rows and columns of zeros where the matrix has a lower rank."""
        first, second = self._names()
        a, b = (found.up.T, found.down.T) if self.turned else (found.down, found.up)
        short = self.rank(wanted) - found.rank
        return {
            first: torch.nn.functional.pad(a, (0, 0, 0, short)).contiguous(),
            second: torch.nn.functional.pad(b, (0, short)).contiguous(),
        }

    def _names(self) -> tuple[str, str]:
        ends = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        return f"{PREFIX}{self.path}.{ends[0]}", f"{PREFIX}{self.path}.{ends[1]}"


def read_config(base: Path) -> dict[str, Any]:
    """The config.json in the folder of the base; empty where it has none that can be read."""
    try:
        config = json.loads((base / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def modules_of(spec: TensorSpec, base: Schema, config: Mapping[str, Any]) -> list[Module]:
    """The modules that move this tensor of the base when they get a LoRA; none where no LoRA can.

    A LoRA moves matrices of linear layers and embeddings. Biases, norms, convolutions, stacks of matrices and bare
    parameters stay. A tied tensor has several modules, for peft would move one alone; where their names are not known,
    it stays as well.
    """
    path = spec.name.removesuffix(".weight")
    leaf = _leaf(spec)
    if path == spec.name or len(spec.shape) != 2 or not spec.numel or not spec.floating or leaf in NOT_LINEAR:
        return []
    kind = config.get("model_type")
    if kind in SHARED_BIASES and leaf == "relative_attention_bias":
        return []
    of_tokens = _of_tokens(spec, config)
    embedding = of_tokens or any(fnmatchcase(leaf, glob) for glob in EMBEDDINGS)
    turned = embedding or (leaf in TRANSPOSED and _transposes(config))
    architecture = _architecture(config)
    composite = architecture.endswith(COMPOSITE)
    if not of_tokens or (config.get("tie_word_embeddings") is False and not composite):
        return [Module(path, spec, embedding, turned)]
    root = path.partition(".")[0]
    known = root in ROOTS or root == leaf
    if composite or architecture.endswith(WITH_UNKNOWN_HEAD) or (architecture.endswith(WITH_HEAD) and not known):
        return []
    found = [Module(path, spec, embedding, turned)]
    if leaf == "shared":
        above = path.removesuffix("shared")
        found += [Module(f"{above}{part}.embed_tokens", spec, True, True) for part in ("encoder", "decoder")]
    if architecture.endswith(WITH_HEAD):
        head = "proj_out" if kind == "whisper" else "lm_head"
        found.append(Module(head, spec, False, False))
    return [found[0], *(module for module in found[1:] if f"{module.path}.weight" not in base)]


def has_output(config: Mapping[str, Any]) -> bool:
    """True unless the architecture is known to have no output layer, to which an embedding could be tied."""
    architecture = _architecture(config)
    if architecture.endswith(WITHOUT_OUTPUT):
        return False
    return architecture.endswith((*WITH_OUTPUT, COMPOSITE)) or not architecture.endswith(BARE)


def is_tied(spec: TensorSpec, base: Schema, config: Mapping[str, Any]) -> bool:
    """True for an embedding of tokens that is the output layer's matrix too: the architecture has one, config.json does
    not say that they are two, and the base stores no other matrix of its shape by the name of one. Where the parts of a
    model say different things (a vision-language model's text_config does), one that ties is believed."""
    return (
        len(spec.shape) == 2
        and spec.name.endswith(".weight")
        and _of_tokens(spec, config)
        and _architecture(config).endswith(WITH_OUTPUT)
        and not _architecture(config).endswith(WITHOUT_OUTPUT)
        and _may_tie(config)
        and not any(_leaf(other) in OUTPUTS and other.shape == spec.shape for other in base.values())
    )


def adapter_config(modules: Sequence[Module], rank: int, base_name: str) -> bytes:
    """The bytes of adapter_config.json. Every module is scaled by exactly 1: alpha is its rank."""
    ranks = {f"^{re.escape(module.path)}": module.rank(rank) for module in modules if module.rank(rank) != rank}
    content = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": sorted(module.path for module in modules),
        "fan_in_fan_out": any(module.turned and not module.embedding for module in modules),
        "bias": "none",
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    return json.dumps(content, indent=2).encode() + b"\n"


def _leaf(spec: TensorSpec) -> str:
    """The last part of its module's name."""
    return spec.name.removesuffix(".weight").rpartition(".")[2]


def _of_tokens(spec: TensorSpec, config: Mapping[str, Any]) -> bool:
    return _leaf(spec) in OF_TOKENS or _leaf(spec) == OWN_NAME.get(str(config.get("model_type")))


def _transposes(config: Mapping[str, Any]) -> bool:
    return any(part.get("model_type") in TRANSPOSED_MODELS for part in _parts(config))


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The model's own config, and its parts'."""
    yield config
    yield from (part for part in config.values() if isinstance(part, dict))


def _may_tie(config: Mapping[str, Any]) -> bool:
    said = [part["tie_word_embeddings"] for part in _parts(config) if "tie_word_embeddings" in part]
    return not said or any(value is not False for value in said)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
