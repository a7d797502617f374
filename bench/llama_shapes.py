"""Checkpoints in the shapes of a small Llama in bfloat16, made offline: a base and N experts.

    python -m bench.llama_shapes FOLDER --experts 4 --seed 0     # FOLDER/base, FOLDER/expert-000, ... (508 MB each)

254 M parameters, hidden size 1024, 16 layers, 32,000 tokens, untied embeddings, half as many key heads as query heads.
`AutoModelForCausalLM.from_pretrained` loads the folders; there is no tokenizer in them. What the weights are like is in
shapes.py.
"""

from dataclasses import dataclass

import torch

from bench.shapes import INIT_STD, Init, Model, command_line


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama configuration that decide names and shapes."""

    hidden: int = 1024
    mlp: int = 2816
    layers: int = 16
    heads: int = 16
    key_heads: int = 8
    vocabulary: int = 32_000

    def model(self) -> Model:
        """What the folders hold, loadable as a LlamaForCausalLM."""
        return Model(self._config(), self._tensors(), torch.bfloat16)

    def _config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "torch_dtype": "bfloat16",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "initializer_range": INIT_STD,
            "tie_word_embeddings": False,
        }

    def _tensors(self) -> dict[str, Init]:
        """Every tensor by name, in the order of the reference implementation."""
        hidden, mlp = self.hidden, self.mlp
        keys = hidden // self.heads * self.key_heads
        norm = Init((hidden,), 1.0, 0.0)
        named = {"model.embed_tokens.weight": Init((self.vocabulary, hidden), 0.0, INIT_STD)}
        for index in range(self.layers):
            matrices = {
                "self_attn.q_proj": (hidden, hidden),
                "self_attn.k_proj": (keys, hidden),
                "self_attn.v_proj": (keys, hidden),
                "self_attn.o_proj": (hidden, hidden),
                "mlp.gate_proj": (mlp, hidden),
                "mlp.up_proj": (mlp, hidden),
                "mlp.down_proj": (hidden, mlp),
            }
            layer = f"model.layers.{index}"
            named |= {f"{layer}.{name}.weight": Init(size, 0.0, INIT_STD) for name, size in matrices.items()}
            named[f"{layer}.input_layernorm.weight"] = norm
            named[f"{layer}.post_attention_layernorm.weight"] = norm
        named["model.norm.weight"] = norm
        named["lm_head.weight"] = Init((self.vocabulary, hidden), 0.0, INIT_STD)
        return named


SMALL = Shape(hidden=64, mlp=176, layers=2, heads=4, key_heads=2, vocabulary=512)
"""The same names at a size that a laptop merges in a second."""


if __name__ == "__main__":
    command_line("Write checkpoints in the shapes of a small Llama.", Shape().model(), SMALL.model())
