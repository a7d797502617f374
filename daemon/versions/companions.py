"""What of a model's folder goes with its weights: everything that is no weights, no code and no secret.

Not a list of known names: tokenizers bring files of their own (bpe.codes, sentencepiece.bpe.model, tekken.json), and a
loader that lacks one fails, or silently reads text as something else.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from daemon.checkpoints.adapter_config import ADAPTER
from daemon.checkpoints.expert_json import ABOUT
from daemon.checkpoints.weight_names import SUFFIX
from daemon.errors import BadHome
from daemon.layout import ADAPTER_FOLDER, CARD, COEFFICIENTS, MANIFEST, Home
from daemon.pull.foreign_manifest import is_plain
from projector.text import shown

MOST_BYTES = 256 << 20  # of one file: the largest tokenizers have about 40 MB, and every version has a copy
MOST_BYTES_TOGETHER = 1 << 30
MOST_FILES = 2000
MOST_DEEP = 8
MOST_SAID = 20
MAX_MODULES_BYTES = 1 << 20

WEIGHTS = (
    *(SUFFIX, ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".gguf", ".ggml", ".llamafile"),
    *(".onnx", ".onnx_data", ".h5", ".hdf5", ".keras", ".msgpack", ".tflite", ".pb", ".mlmodel", ".engine", ".plan"),
    *(".ot", ".nemo", ".mar", ".dduf", ".pdparams", ".distcp", "weights.npz", "openvino_model.xml"),
    *(".part", ".partial", ".tmp", ".lock", ".aria2", "~"),
)
"""What the names of weights end with, in any format, and of files that are not complete."""
CODE = (
    *(".py", ".pyc", ".pyi", ".pyx", ".ipynb", ".sh", ".bash", ".bat", ".cmd", ".ps1", ".js", ".mjs", ".wasm"),
    *(".so", ".dylib", ".dll", ".exe", ".c", ".cc", ".cpp", ".cu", ".jar", ".class", ".php", ".lua"),
)
SECRETS = (
    *("*.pem", "*.key", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdbx", "id_rsa*", "id_ed25519*", "id_ecdsa*"),
    *("*credential*", "*secret*", "*password*", "*passwd*", "*api_key*", "*apikey*", "*api-key*", "kaggle.json"),
    *("token", "token.*", "*.token", "*hf_token*", "*access_token*", "*auth_token*", "*service_account*.json"),
)
"""Globs for names in lower case. tokens.txt is a vocabulary, and so may be most other names with tokens in them."""
TRAINING = ("optimizer*", "rng_state*", "trainer_state.json", "training_args*", "events.out.tfevents*", "zero_pp_rank*")
OURS = (CARD.lower(), MANIFEST, COEFFICIENTS, ADAPTER, ABOUT)
"""What every version has of its own, and what would make an adapter of its folder."""
NOT_BELOW = ("checkpoint-*", "global_step*", "__pycache__", "runs", "wandb", "mlruns", "node_modules", ADAPTER_FOLDER)
MODULE = "[0-9]_[A-Z]*"  # a folder of sentence-transformers, such as 2_Dense
KENLM = b"mmap lm http://kheafield.com/code"
_INDEX = re.compile(r".+\.(safetensors|bin|h5|msgpack|onnx)\.index(\.\w+)?\.json")


@dataclass(frozen=True)
class Companions:
    """files: their paths in the folder, sorted, as manifests name them. left_out: the others, each with its reason."""

    files: Sequence[str]
    left_out: Sequence[str]

    @property
    def said(self) -> str:
        """What is left out, in words; empty where nothing is."""
        more = len(self.left_out) - MOST_SAID
        return ", ".join([*self.left_out[:MOST_SAID], *([f"and {more} more"] if more > 0 else [])])


def companions(folder: Path, weights: Sequence[str] = ()) -> Companions:
    """What goes with the weights of the model in this folder. weights: their files, which are no companions.

    The weights of a module of sentence-transformers, in a folder of its own, are: no expert brings them. A link is
    followed where it stays in the folder, or leads to where the weights themselves are (as in the hub's cache). Raises
    BadHome where there is too much.
    """
    roots = [folder.resolve(), *{(folder / name).resolve().parent for name in weights if (folder / name).is_symlink()}]
    modules = modules_of(folder)
    files: list[str] = []
    left_out: list[str] = []
    size = 0
    for path in _walk(folder, folder, left_out):
        name = path.relative_to(folder).as_posix()
        if name in weights:
            continue
        why = _why_not(path, name, roots, modules)
        if why is None:
            files.append(name)
            size += 0 if name.endswith(SUFFIX) else path.stat().st_size
        elif why:
            left_out.append(f"{shown(name)} ({why})")
        if len(files) > MOST_FILES or size > MOST_BYTES_TOGETHER:
            raise BadHome(
                f"{shown(str(folder))} holds more than {MOST_FILES} files, or {MOST_BYTES_TOGETHER} bytes, beside its "
                "weights",
                "copy the model alone into a folder of its own: every version has a copy of them all",
            )
    return Companions(sorted(files), left_out)


def _walk(folder: Path, top: Path, left_out: list[str]) -> Iterator[Path]:
    """Every file of a folder and those below it that can be published at all, in order; what else is told."""
    for path in sorted(folder.iterdir()):
        name = shown(path.relative_to(top).as_posix())
        if path.name.startswith(".") or not path.name.isprintable():
            left_out.append(f"{name} (hidden)")
        elif not path.is_dir():
            yield path
        elif path.is_symlink():
            left_out.append(f"{name} (a link to a folder)")
        elif any(fnmatchcase(path.name, glob) for glob in NOT_BELOW) or (path / ADAPTER).exists() or _is_home(path):
            left_out.append(f"{name} (a folder of something else)")
        elif len(path.relative_to(top).parts) > MOST_DEEP or not os.access(path, os.R_OK | os.X_OK):
            left_out.append(f"{name} (a folder that lies too deep, or cannot be read)")
        else:
            yield from _walk(path, top, left_out)


def _is_home(path: Path) -> bool:
    return Home(path).exists() or Home(path).founding.exists()


def _why_not(path: Path, name: str, roots: Sequence[Path], modules: Sequence[str]) -> str | None:
    """Why a file is left out; empty where that goes without saying, None where it is a companion."""
    lower = path.name.lower()
    if name.lower() in OURS or _INDEX.fullmatch(lower):
        return ""
    if not path.is_file() or not os.access(path, os.R_OK):
        return "no file, or none that can be read"
    if not is_plain(name):
        return "no pull takes such a name"
    if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
        return "a link that leads out of the folder"
    if lower.endswith(WEIGHTS) and not _is_language_model(path):
        above = name.rpartition("/")[0]
        of_module = lower.endswith(SUFFIX) and any(fnmatchcase(above, module) for module in modules)
        return None if of_module else "weights"
    if lower.endswith(CODE):
        return "code"
    if any(fnmatchcase(lower, glob) for glob in SECRETS):
        return "a secret, by its name"
    if any(fnmatchcase(lower, glob) for glob in TRAINING):
        return "of a training run"
    if (size := path.stat().st_size) > MOST_BYTES:
        return f"{size} bytes, {MOST_BYTES} at the most"
    return None


def _is_language_model(path: Path) -> bool:
    """True for what a speech model's decoder looks words up in: named as weights often are, and nobody's weights."""
    with path.open("rb") as file:
        return path.suffix == ".bin" and file.read(len(KENLM)) == KENLM


def modules_of(folder: Path) -> Sequence[str]:
    """The folders of a sentence-transformers model's modules, as globs."""
    path = folder / "modules.json"
    if not path.is_file() or path.stat().st_size > MAX_MODULES_BYTES:
        return [MODULE]
    try:
        named = [module["path"] for module in json.loads(path.read_bytes())]
    except (ValueError, TypeError, KeyError, RecursionError):
        return [MODULE]
    return [MODULE, *(re.sub(r"([*?[])", r"[\1]", name) for name in named if isinstance(name, str) and name)]
