"""What else weights are saved as, told by the names of their files, and how they become safetensors."""

from collections.abc import Iterable

from projector.text import EXPERT, FOLDER, OUT

FORMATS = {
    ".distcp": (
        "a distributed checkpoint",
        f"gather it (accelerate merge-weights {EXPERT} {OUT}; or FSDP's state_dict_type FULL_STATE_DICT), and drop what"
        " that makes",
    ),
    ".gguf": ("GGUF", "it is made for inference: drop the model that it was made from"),
    ".onnx": ("ONNX", "it is made for inference: drop the model that it was exported from"),
    ".h5": (
        "weights of Keras",
        "with transformers 4 and TensorFlow, of the model's own class, "
        f'from_pretrained("{FOLDER}", from_tf=True).save_pretrained("{OUT}"), and drop that',
    ),
    ".msgpack": (
        "weights of Flax",
        "with transformers 4 and Flax, of the model's own class, "
        f'from_pretrained("{FOLDER}", from_flax=True).save_pretrained("{OUT}"), and drop that',
    ),
    ".nemo": ("an archive of NeMo", "export it to Hugging Face's form with NeMo, and drop that folder"),
    ".npz": (
        "arrays of numpy or MLX",
        "save it as safetensors: mlx.core.save_safetensors, safetensors.numpy.save_file",
    ),
}
"""By the suffix of a file: what it is, and what to do."""


def other_format(names: Iterable[str]) -> tuple[str, str] | None:
    """(what these files are, what to do) where one of them is of a format that is known and not read."""
    there = list(names)
    return next((said for suffix, said in FORMATS.items() if any(name.endswith(suffix) for name in there)), None)
