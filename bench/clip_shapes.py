"""Checkpoints in the exact shapes of CLIP ViT-B/32's vision tower, made offline: a base and N experts.

    python -m bench.clip_shapes FOLDER --experts 3 --seed 0      # FOLDER/base, FOLDER/expert-000, ... (350 MB each)

Names and shapes are a function of the configuration's numbers; `AutoModel.from_pretrained` loads the folders it writes.
What the weights are like is in shapes.py.
"""

from dataclasses import dataclass

from bench.shapes import INIT_STD, Init, Model, command_line


@dataclass(frozen=True)
class Shape:
    """The numbers of a CLIP vision configuration that decide names and shapes; the default is ViT-B/32."""

    hidden: int = 768
    mlp: int = 3072
    layers: int = 12
    heads: int = 12
    image: int = 224
    patch: int = 32

    def model(self) -> Model:
        """What the folders hold, loadable as a CLIPVisionModel."""
        return Model(self._config(), self._tensors())

    def _config(self) -> dict[str, object]:
        return {
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.image,
            "patch_size": self.patch,
            "num_channels": 3,
            "projection_dim": 512,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "initializer_factor": 1.0,
            "initializer_range": INIT_STD,
        }

    def _tensors(self) -> dict[str, Init]:
        """Every tensor of the vision tower by name, in the order of the reference implementation."""
        hidden, mlp = self.hidden, self.mlp
        narrow = hidden**-0.5 * (2 * self.layers) ** -0.5
        named: dict[str, Init] = {}

        def weight(name: str, size: tuple[int, ...], std: float) -> None:
            named[f"vision_model.{name}"] = Init(size, 0.0, std)

        def linear(name: str, rows: int, columns: int, std: float) -> None:
            weight(f"{name}.weight", (rows, columns), std)
            weight(f"{name}.bias", (rows,), 0.0)

        def norm(name: str) -> None:
            named[f"vision_model.{name}.weight"] = Init((hidden,), 1.0, 0.0)
            weight(f"{name}.bias", (hidden,), 0.0)

        weight("embeddings.class_embedding", (hidden,), hidden**-0.5)
        weight("embeddings.patch_embedding.weight", (hidden, 3, self.patch, self.patch), INIT_STD)
        weight("embeddings.position_embedding.weight", ((self.image // self.patch) ** 2 + 1, hidden), INIT_STD)
        norm("pre_layrnorm")
        for index in range(self.layers):
            layer = f"encoder.layers.{index}"
            for projection in ("k_proj", "v_proj", "q_proj"):
                linear(f"{layer}.self_attn.{projection}", hidden, hidden, narrow)
            linear(f"{layer}.self_attn.out_proj", hidden, hidden, hidden**-0.5)
            norm(f"{layer}.layer_norm1")
            linear(f"{layer}.mlp.fc1", mlp, hidden, (2 * hidden) ** -0.5)
            linear(f"{layer}.mlp.fc2", hidden, mlp, narrow)
            norm(f"{layer}.layer_norm2")
        norm("post_layernorm")
        return named


SMALL = Shape(hidden=64, mlp=256, layers=2, heads=4, image=64, patch=16)
"""The same names at a size that a laptop merges in a second, for trying a comparison out."""


if __name__ == "__main__":
    command_line("Write CLIP-ViT-B/32-shaped checkpoints: a base and its experts.", Shape().model(), SMALL.model())
