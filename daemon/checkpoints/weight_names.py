"""What the files that hold a model's weights are called: which in a folder they are, and how more of them would be.

Loaders agree on the form and not on the name: transformers writes model.safetensors, diffusers
diffusion_pytorch_model.safetensors, others what they like; in shards NAME-00001-of-00002.safetensors with the index
NAME.safetensors.index.json. A variant (NAME.fp16.safetensors) is the same weights once more. Names alone count here.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from projector.text import EXPERT, FOLDER, OUT

SUFFIX = ".safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
FIRST = ("model", "diffusion_pytorch_model")  # which a folder's weights are, where it holds others too
SHARD_OF_MANY = re.compile(r"-\d+-of-(?!0*1\.)\d+\.safetensors$")
_SHARD = re.compile(r"(?P<name>.+)-\d+-of-\d+")
_INDEX = re.compile(r"(?P<name>.+)\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")
_VARIANT = re.compile(rf"({'|'.join(FIRST)})\.(?P<variant>\w+)")

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
"""What else weights are saved as, by the suffix of a file: what it is, and how it becomes safetensors."""
OF_A_MODEL = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NOT_OF_A_MODEL = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")  # a Trainer's, in its folder too


@dataclass(frozen=True)
class WeightNames:
    """What a model's weights are called, less what says that it is a file: "model", or "model.fp16"."""

    name: str

    @property
    def variant(self) -> str | None:
        """The word by which loaders ask for a variant, where it is one: "fp16"."""
        found = _VARIANT.fullmatch(self.name)
        return found["variant"] if found else None

    @property
    def whole(self) -> str:
        """Of all of them in one file."""
        return f"{self.name}{SUFFIX}"

    @property
    def pattern(self) -> str:
        """Of shards; `suffix` in it is to be filled in."""
        return f"{self.name}{{suffix}}{SUFFIX}"

    @property
    def index(self) -> str:
        """Of the index of shards: the variant stands behind everything else."""
        plain = self.name.removesuffix(f".{self.variant}")
        return f"{plain}{SUFFIX}.index{f'.{self.variant}' if self.variant else ''}.json"


def weight_names(files: Iterable[str]) -> WeightNames:
    """What the weights in these files are called, of which some may be others: by their index, else by a file.

    >>> weight_names(["config.json", "model-00001-of-00002.safetensors"]).name
    'model'
    """
    own = sorted(file for file in files if "/" not in file)
    if index := next(filter(None, map(_INDEX.fullmatch, own)), None):
        return WeightNames(_joined(index))
    found = next((file.removesuffix(SUFFIX) for file in own if file.endswith(SUFFIX)), FIRST[0])
    shard = _SHARD.fullmatch(found)
    return WeightNames(shard["name"] if shard else found)


def _joined(index: re.Match[str]) -> str:
    return ".".join(filter(None, (index["name"], index["variant"])))


def is_index(name: str) -> bool:
    """True for the index of shards, by any of its names."""
    return _INDEX.fullmatch(name) is not None


def checkpoints(names: Iterable[str], beside: Collection[str] = ()) -> list[str]:
    """The checkpoints that lie in a folder, each as its one file or its index; no variant of one that is there too.

    beside: what is no checkpoint whatever it is called. Where one of the usual names is among them it is alone.
    """
    found: dict[str, str] = {}
    for name in sorted(names):
        index = _INDEX.fullmatch(name)
        if index:
            found.setdefault(_joined(index), name)
        elif name.endswith(SUFFIX) and name not in beside and not (name.startswith(".") or SHARD_OF_MANY.search(name)):
            found[name.removesuffix(SUFFIX)] = name  # the whole file goes before an index
    if usual := next((name for name in FIRST if name in found), None):
        return [found[usual]]
    return [file for name, file in found.items() if name.rpartition(".")[0] not in found]


def other_format(names: Iterable[str]) -> tuple[str, str] | None:
    """(what these files are, what to do) where one of them is of a format that is known and not read."""
    there = list(names)
    return next((said for suffix, said in FORMATS.items() if any(name.endswith(suffix) for name in there)), None)
