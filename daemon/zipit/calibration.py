"""Runs models on calibration data: those of a person's own Python file, or those that transformers knows.

A file FILE.py has two functions: `model(folder)` makes the torch module for the checkpoint at that path, into which its
weights are loaded here, and `batches()` yields what the module is called with: a tensor, a tuple or a dict. It is
called anew for each look at the data. Whatever stands in the file is run, with the caller's rights.

A model that transformers knows is made from its folder alone: FILE.txt has a text in each line, FILE.safetensors the
arguments of `forward` by name, samples first.
"""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from daemon.checkpoints.weight_names import WEIGHTS
from daemon.errors import Reason, Refused
from projector.text import listed, shown

CONFIG = "config.json"
BATCH = 16  # samples of a .txt or .safetensors file that are run at once
MOST_TOKENS = 512  # of a text; the rest is cut off
SAVE = "save the model with save_pretrained"
SEGMENTS = "token_type_ids"  # which many tokenizers give and few models take


class Calibration(Protocol):
    """Models, and data to run them on."""

    def module(self, weights: Mapping[str, Tensor], folder: Path) -> nn.Module:
        """The model of the checkpoint at `folder` with these weights, in evaluation mode. Raises Refused."""

    def batches(self) -> Iterable[Any]:
        """The data, from its beginning: what a module is called with. Raises Refused."""


def open_calibration(path: Path, like: Path) -> Calibration:
    """What the person named. like: the first model. Raises Refused."""
    if not path.is_file():
        raise _refused(f"there is no file {path}", "give a FILE.py, FILE.txt or FILE.safetensors: see docs/zipit.md")
    if path.suffix == ".py":
        return PythonFile(path)
    if path.suffix not in (".txt", ".safetensors"):
        raise _refused(f"{path.name} is no calibration data", "give a FILE.py, FILE.txt or FILE.safetensors")
    if not (like / CONFIG).is_file():
        raise _refused(
            f"{like} has no {CONFIG}, by which transformers would know it",
            "give a FILE.py that makes the model: see docs/zipit.md",
        )
    return Transformers(path, like)


def call(module: nn.Module, batch: Any) -> Any:
    """Runs a model on one batch. Raises Refused."""
    try:
        if isinstance(batch, Mapping):
            return module(**batch)
        return module(*batch) if isinstance(batch, tuple | list) else module(batch)
    except Exception as error:
        what = f"the model cannot be run on the calibration data: {type(error).__name__}: {error}"
        raise _refused(what, "let the data be what the model's forward takes") from error


class PythonFile:
    """A person's own file."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        spec = importlib.util.spec_from_file_location(f"mainstem_calibration_{path.stem}", path)
        assert spec and spec.loader
        self._file = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(self._file)
        except Exception as error:
            raise _refused(
                f"{path.name} failed: {type(error).__name__}: {error}", "run it by itself, and mend it"
            ) from error
        for name in ("model", "batches"):
            if not callable(getattr(self._file, name, None)):
                raise _refused(f"{path.name} has no function {name}", "give it both: model(folder) and batches()")

    def module(self, weights: Mapping[str, Tensor], folder: Path) -> nn.Module:
        try:
            module = self._file.model(folder)
        except Exception as error:
            what = f"model() of {self._name} failed: {type(error).__name__}: {error}"
            raise _refused(what, "let it make the module for that checkpoint") from error
        if not isinstance(module, nn.Module):
            raise _refused(f"model() of {self._name} gives no torch module", "let it return one")
        try:
            module.load_state_dict(dict(weights))
        except RuntimeError as error:
            what = f"the weights of {folder} do not fit what model() of {self._name} makes: {_line(error)}"
            raise _refused(what, "let it make the module that they were saved from") from error
        return module.eval()

    def batches(self) -> Iterator[Any]:
        try:
            yield from self._file.batches()
        except Refused:
            raise
        except Exception as error:
            what = f"batches() of {self._name} failed: {type(error).__name__}: {error}"
            raise _refused(what, "let it yield what the model is called with") from error


class Transformers:
    """A model that transformers knows, and a file of texts or of tensors."""

    def __init__(self, path: Path, like: Path) -> None:
        self._path = path
        self._like = like
        self._inputs: list[dict[str, Any]] | None = None
        self._arguments: set[str] = set()  # of the newest model's forward
        try:
            import transformers
        except ImportError as error:
            raise _refused("transformers is not installed", "pip install transformers") from error
        self._transformers: Any = transformers
        self._transformers.logging.set_verbosity_error()
        self._transformers.logging.disable_progress_bar()

    def module(self, weights: Mapping[str, Tensor], folder: Path) -> nn.Module:
        try:
            config = json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise _refused(f"{folder / CONFIG} cannot be read: {error}", SAVE) from error
        if not isinstance(config, dict):
            raise _refused(f"{folder / CONFIG} is no JSON object", SAVE)
        kinds = config.get("architectures") or ["AutoModel"]
        named = str(kinds[0]) if isinstance(kinds, list) else str(kinds)
        kind = getattr(self._transformers, named, None)
        if kind is None:
            own = "give a FILE.py that makes the model: see docs/zipit.md"
            raise _refused(f"transformers has no {shown(named)}", own)
        with TemporaryDirectory() as made:  # transformers renames tensors as it loads, so that it must load a folder
            (Path(made) / CONFIG).write_text(json.dumps(config))
            whole = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(whole, Path(made) / WEIGHTS, {"format": "pt"})
            try:
                module, info = kind.from_pretrained(
                    made, local_files_only=True, output_loading_info=True, dtype="float32"
                )
            except Exception as error:
                what = f"{shown(named)} cannot be loaded: {type(error).__name__}: {_line(error)}"
                raise _refused(what, SAVE) from error
        if missing := sorted(info["missing_keys"]):
            raise _refused(f"{folder} has no {listed(missing)}", SAVE)
        self._arguments = {*signature(module.forward).parameters}
        evaluating: nn.Module = module.eval()
        return evaluating

    def batches(self) -> Iterable[Any]:
        if self._inputs is None:
            self._inputs = self._texts() if self._path.suffix == ".txt" else self._tensors()
        return self._inputs

    def _texts(self) -> list[dict[str, Any]]:
        try:
            texts = [line for line in self._path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except UnicodeDecodeError as error:
            raise _refused(
                f"{self._path.name} is not UTF-8: {error}", "save it as UTF-8, a text in each line"
            ) from None
        try:
            tokenizer = self._transformers.AutoTokenizer.from_pretrained(self._like, local_files_only=True)
        except Exception as error:
            what = f"{self._like} has no tokenizer that can be loaded: {_line(error)}"
            raise _refused(what, "give the inputs as FILE.safetensors, or save the tokenizer with the model") from error
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        tokenizer.padding_side = "right"
        padded = tokenizer.pad_token is not None
        longest = min(MOST_TOKENS, tokenizer.model_max_length)
        found = []
        step = BATCH if padded else 1
        for some in (texts[start : start + step] for start in range(0, len(texts), step)):
            made = tokenizer(some, padding=padded, truncation=True, max_length=longest, return_tensors="pt")
            found.append({name: one for name, one in made.items() if name != SEGMENTS or name in self._arguments})
        return found

    def _tensors(self) -> list[dict[str, Any]]:
        try:
            inputs = load_file(self._path)
        except (SafetensorError, OSError) as error:
            raise _refused(f"{self._path} cannot be read: {error}", "save it with safetensors' save_file") from error
        lengths = {tensor.shape[0] if tensor.ndim else 0 for tensor in inputs.values()}
        if len(lengths) != 1:
            raise _refused(f"the inputs in {self._path.name} are not of one number of samples", "put samples first")
        return [
            {name: tensor[start : start + BATCH] for name, tensor in inputs.items()}
            for start in range(0, lengths.pop(), BATCH)
        ]


def _line(error: Exception) -> str:
    """What it says, in one line of bearable length."""
    return shown(" ".join(str(error).split()), most=300)


def _refused(detail: str, hint: str) -> Refused:
    return Refused(Reason.ZIPIT, detail, hint)
