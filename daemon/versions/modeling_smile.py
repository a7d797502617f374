"""Any transformers model with routed linear layers: SMILE (Tang et al., arXiv 2408.10174), as mainstem exports it.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

The model is the ordinary class that config.json's "smile" names the type of, in which each of the layers listed there
has its experts beside its weight. Needs torch and transformers, and nothing else.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

MODEL_TYPE = "mainstem_smile"  # nobody who knows no router takes the folder for an ordinary model

logger = logging.get_logger(__name__)


def route(
    x: Tensor, inwards: Tensor, s: Tensor, outwards: Tensor, moved: Tensor | None, smile: dict[str, Any]
) -> Tensor:
    """What the experts add to a linear layer's output, (tokens, m), for its inputs x (tokens, n).

    inwards: (experts, q, n), outwards: (experts, q, m) and s: (experts, q): the singular triplets of how each expert
    moved the weight, the largest first. moved: (experts, m), how it moved the bias.

    An expert's logit is the norm of the input's part in its first `gate_rank` directions. The softmax is over all
    experts, and the shares of the `top_k` largest are made to sum to one. What they say takes `rank` directions.
    """
    experts, rank, gate_rank = len(inwards), smile["rank"], smile["gate_rank"]
    seen = nn.functional.linear(x, inwards[:, :gate_rank].flatten(0, 1)).reshape(len(x), experts, -1)
    logits = seen.norm(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    shares, chosen = logits.softmax(-1).topk(min(smile["top_k"], experts), dim=-1)
    shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
    added = x.new_zeros(len(x), outwards.shape[2])
    for expert in range(experts):
        token, place = torch.where(chosen == expert)
        own = nn.functional.linear(x[token], inwards[expert, :rank]) * s[expert, :rank]
        said = own @ outwards[expert, :rank]
        if moved is not None:
            said = said + moved[expert]
        added[token] += said * shares[token, place, None]  # it chose this expert once
    return added


class _Routed(nn.Module):
    """What a linear layer has more once it is routed. Its own parameters keep their names."""

    weight: Any
    bias: Any

    def add_experts(self, smile: dict[str, Any]) -> None:
        """Makes room for them."""
        self.smile = smile
        experts, (m, n) = smile["experts"], self.weight.shape
        kept = min(max(smile["rank"], smile["gate_rank"]), m, n)
        self.experts_left = nn.Parameter(self.weight.new_zeros(experts, kept, m))
        self.experts_right = nn.Parameter(self.weight.new_zeros(experts, kept, n))
        self.experts_s = nn.Parameter(self.weight.new_zeros(experts, kept))
        biased = self.bias is not None
        self.experts_bias = nn.Parameter(self.bias.new_zeros(experts, len(self.bias))) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own output, and what the experts add to it."""
        own: Tensor = super().forward(x)
        inwards, outwards = self.experts_right, self.experts_left
        if isinstance(self, Conv1D):  # whose weight is (n, m)
            inwards, outwards = outwards, inwards
        flat = x.reshape(-1, x.shape[-1])
        return own + route(flat, inwards, self.experts_s, outwards, self.experts_bias, self.smile).reshape(own.shape)


class RoutedLinear(_Routed, nn.Linear):
    """The usual one."""


class RoutedConv1D(_Routed, Conv1D):
    """GPT-2's."""


ROUTED = {nn.Linear: RoutedLinear, Conv1D: RoutedConv1D}


_Model: Any = object  # in truth the ordinary model's class


class RoutedModel(_Model):  # type: ignore[misc]
    """What a model's class has more: its listed layers are routed once it is built, before its weights are read."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        layers = dict.fromkeys(config.smile["layers"])
        prefix = f"{self.base_model_prefix}."  # a file may have been written with it, and be read without, and so on
        for name, module in self.named_modules():
            found = next((one for one in (name, prefix + name, name.removeprefix(prefix)) if one in layers), None)
            if found is None or type(module) not in ROUTED:
                continue
            module.__class__ = ROUTED[type(module)]
            module.add_experts(config.smile)
            del layers[found]
        if len(layers) == len(config.smile["layers"]):
            raise ValueError(
                f"no layer of {type(self).__name__} is routed: {_some(layers)} are none of its linear layers"
            )
        if layers:
            logger.warning(f"not routed, as they are no linear layers of {type(self).__name__}: {_some(layers)}")

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the library does, and what loads it again."""
        super().save_pretrained(save_directory, *args, **kwargs)
        shutil.copyfile(__file__, Path(save_directory) / "modeling_smile.py")
        path = Path(save_directory) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": MODEL_TYPE}, indent=2) + "\n")


class RoutedConfig:
    """Reads the folder's config.json as the configuration of the ordinary model."""

    @staticmethod
    def register_for_auto_class(*_: Any) -> None:
        """Nothing to register: `auto_map` says it all."""

    @classmethod
    def from_pretrained(cls, path: Any, **kwargs: Any) -> Any:
        """An object of the ordinary model's configuration class, with what was written of the router beside."""
        found, unused = PretrainedConfig.get_config_dict(path, **kwargs)
        kind = found["smile"]["model_type"]
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"this transformers knows no model of the type {kind!r}, which {path} is made of")
        return CONFIG_MAPPING[kind].from_dict({**found, "model_type": kind}, **unused)


class _Auto:
    """What `auto_map` names for one of transformers' auto classes: it finds the class that this one stands for."""

    auto: Any

    @staticmethod
    def register_for_auto_class(*_: Any, **__: Any) -> None:
        """Nothing to register: `auto_map` says it all."""

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, config: PretrainedConfig, **kwargs: Any) -> Any:
        """The model with its weights."""
        return cls._routed(config).from_pretrained(path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PretrainedConfig, **kwargs: Any) -> Any:
        return cls._routed(config)._from_config(config, **kwargs)

    @classmethod
    def _routed(cls, config: PretrainedConfig) -> Any:
        if type(config) not in cls.auto._model_mapping:
            raise ValueError(f"{cls.auto.__name__} has no model of the type {config.smile['model_type']!r}")
        found = cls.auto._model_mapping[type(config)]
        several = found if isinstance(found, list | tuple) else [found]
        named = [one for one in several if one.__name__ in (config.architectures or ())]
        real = (named or several)[0]
        return type(real.__name__, (RoutedModel, real), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    if name.startswith("AutoModel") and hasattr(transformers, name):
        return type(name, (_Auto,), {"auto": getattr(transformers, name)})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _some(names: Any) -> str:
    return ", ".join([*names][:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
