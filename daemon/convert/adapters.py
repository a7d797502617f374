"""Makes a PEFT adapter of one that another tool saved: a folder that can be dropped.

What each tool's tensors mean is in projector/lora/other_tools.py. The files are read by the strict rules for any
expert.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from safetensors.torch import save

from daemon.checkpoints.adapter_config import ADAPTER, ADAPTER_WEIGHTS, MLX_WEIGHTS, read_config
from daemon.checkpoints.checkpoint import LFS_OPENING, PICKLED, PICKLED_ADAPTER, PICKLED_INDEX, is_pickle, open_path
from daemon.checkpoints.hints import hinting
from daemon.checkpoints.opening import open_entry
from daemon.checkpoints.weight_names import OF_A_MODEL
from daemon.convert.converting import SUFFIX, Converted
from daemon.disk import durable
from daemon.disk.out import making, new_out
from daemon.errors import Reason, Refused
from projector.files.source import identity
from projector.files.tensorfile import TensorReader
from projector.lora.other_tools import MLX, Said, Tool, as_peft, recognised, recognised_other
from projector.text import shown

FILES = (MLX_WEIGHTS, "pytorch_lora_weights.safetensors", ADAPTER_WEIGHTS, "model.safetensors")
METADATA = "lora_adapter_metadata"  # what diffusers writes of PEFT's config, into the file's header


@dataclass(frozen=True)
class How:
    """base: a checkpoint whose names say which modules there are. alpha: for an adapter that does not say its own.
    only: what the names of its tensors must begin with."""

    base: Path | None = None
    alpha: float | None = None
    only: str = ""


def weights_of(source: Path) -> Path | None:
    """The file of tensors of what may be an adapter of another tool: a .safetensors file, or a folder with one."""
    if source.is_dir():
        names = {path.name for path in source.iterdir()}
        if not names.isdisjoint((PICKLED, PICKLED_INDEX, PICKLED_ADAPTER)):
            return None
        plain = [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
        found = next((name for name in FILES if name in names), plain[0] if len(plain) == 1 else None)
        return source / found if found else None
    if source.suffix != SUFFIX:
        return None
    with suppress(OSError), source.open("rb") as file:
        return None if is_pickle(file.read(len(LFS_OPENING))) else source
    return source


def convert_adapter(source: Path, out: Path, how: How) -> Converted:
    """Converts an adapter, a file or its folder, to the new folder `out`, which appears whole or not at all.

    Raises BadConfig, Refused, BadFile, BadSchema or OSError.
    """
    started = monotonic()
    source = Path(os.path.abspath(source))  # noqa: PTH100 - a link keeps its own name
    out = new_out(out, OF_A_MODEL)
    file = weights_of(source)
    if file is None:
        raise Refused(
            Reason.NO_WEIGHTS, f"{shown(source.name)} has no tensors of an adapter", "name its .safetensors file"
        )
    with ExitStack() as closing:
        closing.enter_context(hinting(source, base=_trained_from(file.parent / ADAPTER, how)))
        parent = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        closing.callback(os.close, parent)
        reader = TensorReader(open_entry(parent, file.name, True, closing))
        tool = _tool(reader, file.name)
        said = Said(
            scale=_scale(file.parent / ADAPTER) if tool is MLX else None,
            config=_configs(reader.header.metadata),
            alpha=how.alpha,
            only=how.only,
            modules=_modules(how.base) if how.base else None,
        )
        tensors, config = as_peft(tool, {name: reader.read(name) for name in reader.specs}, said)
        read_config(config)
        folder = closing.enter_context(making(out))
        written = {ADAPTER: json.dumps(config, indent=2).encode(), ADAPTER_WEIGHTS: save(tensors, {"format": "pt"})}
        for name, data in written.items():
            durable.write_file(folder / name, data)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in written.items()}
    return Converted(
        out=str(out),
        sha256=identity(digests),
        size_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        tensors=len(tensors),
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values())),
        inside="",
        stripped=0,
        shared=[],
        left_out=[],
        files=[
            {"name": name, "of": file.name, "kind": tool.name, "sha256": digest} for name, digest in digests.items()
        ],
        copied=[],
        seconds=monotonic() - started,
    )


def _trained_from(config: Path, how: How) -> str | None:
    """What the adapter's base is called, as far as that is known: by mlx-lm's adapter_config.json, say."""
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        model = json.loads(config.read_bytes()).get("model")
        return model if isinstance(model, str) else None
    return str(how.base) if how.base else None


def _scale(path: Path) -> float:
    """What mlx-lm multiplies by, from its adapter_config.json."""
    hint = "put mlx-lm's own adapter_config.json beside the file"
    try:
        content = json.loads(path.read_bytes())
        parameters = content["lora_parameters"]
        scale = parameters["scale"]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        raise Refused(Reason.CONVERT, f"{ADAPTER} with lora_parameters is not beside it", hint) from None
    if content.get("fine_tune_type", "lora") != "lora":
        detail = f"its fine_tune_type is {shown(str(content['fine_tune_type']))}"
        raise Refused(Reason.CONVERT, detail, f"{MLX.fuse}; drop the whole model")
    if "alpha" in parameters or type(scale) not in (int, float):  # some versions multiply by alpha / rank besides
        detail = "its lora_parameters have an alpha, which not every version of mlx-lm counts"
        raise Refused(Reason.CONVERT, detail, f"{MLX.fuse}, with the version that trained it; drop the whole model")
    return float(scale)


def _configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What diffusers noted of PEFT's config, by what the names of that model's tensors begin with."""
    try:
        noted = json.loads(metadata.get(METADATA, "{}"))
    except (ValueError, RecursionError):
        noted = None
    if not isinstance(noted, dict):
        raise Refused(Reason.CONVERT, f"its metadata has a {METADATA} that is no JSON object", "save the adapter again")
    found: dict[str, dict[str, Any]] = {}
    for key, value in noted.items():
        first, dot, name = key.partition(".")
        found.setdefault(first + dot, {"peft_type": "LORA"})[name] = value
    return found


def _modules(base: Path) -> set[str]:
    with hinting(base), open_path(base) as opened:
        return {name.rpartition(".")[0] for name in opened.tensors.schema}


def _tool(reader: TensorReader, name: str) -> Tool:
    """Whose adapter the tensors are; raises Refused where that is nobody who is known."""
    if other := recognised_other(reader.specs):
        whose, hint, _ = other
        raise Refused(Reason.CONVERT, f"{shown(name)} holds an adapter of {whose}", hint)
    if found := recognised(reader.specs):
        return found[0]
    raise Refused(Reason.CONVERT, f"{shown(name)} is safetensors, and no adapter of another tool", "drop it as it is")
