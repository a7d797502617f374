"""The modules of sentence-transformers beside the transformer: folders such as 2_Dense, which may have weights.

Only the transformer is merged; a version has the base's modules. An expert whose own were trained is another model
without them, so it is refused.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path

from daemon.errors import NotYet, Reason, Refused
from daemon.opening import open_entry
from projector.errors import BadFile, BadSchema
from projector.errors import Reason as Unfit
from projector.tensorfile import TensorReader
from projector.text import listed, shown

MODULES = "modules.json"
MODULE = "[0-9]*_[A-Z]*"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
Tensors = Mapping[str, tuple[str, tuple[int, ...], str]]


def check_modules(folder_fd: int, base: Path) -> None:
    """Raises BadSchema where the folder has other weights in its modules than `base`, the folder of the base, if that
    is a model of sentence-transformers. Reads them; what is pickled is not read, and counts as other weights.
    """
    if not (base / MODULES).exists():
        return
    with ExitStack() as closing:
        there = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        closing.callback(os.close, there)
        for module in modules_with_weights(folder_fd):
            own = _weights(folder_fd, module, closing)
            if own is None or own != _weights(there, module, closing):
                raise BadSchema(
                    Unfit.UNEXPECTED_TENSOR,
                    f"the weights in {shown(module)} are not the base's, and only the transformer's are merged",
                    f"train with that module frozen; or drop the folder without {shown(module)}, if what it learnt may "
                    "be lost: versions have the base's",
                )


def modules_with_weights(folder_fd: int) -> list[str]:
    """The modules' folders that have weights in them, sorted."""
    with os.scandir(folder_fd) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    modules = sorted(name for name in names if fnmatchcase(name, MODULE))
    return [name for name in modules if any(_exists(folder_fd, f"{name}/{file}") for file in WEIGHTS)]


def check_nested(folder_fd: int) -> None:
    """Raises Refused where the transformer lies in a folder of its own, as older releases saved it."""
    if _exists(folder_fd, MODULES) and (below := modules_with_weights(folder_fd)):
        more = f"; {listed(below[1:])} would not be merged" if below[1:] else ""
        raise Refused(
            Reason.NO_WEIGHTS,
            f"this is a model of sentence-transformers, whose transformer is in {shown(below[0])}{more}",
            f"take the folder {shown(below[0])} itself",
        )


def _exists(folder_fd: int, path: str) -> bool:
    return os.access(path, os.F_OK, dir_fd=folder_fd, follow_symlinks=False)


def _weights(folder_fd: int, module: str, closing: ExitStack) -> Tensors | None:
    """Its tensors by name; None where it has none in a .safetensors file."""
    try:
        folder = open_entry(folder_fd, module, False, closing)
        reader = TensorReader(open_entry(folder, WEIGHTS[0], False, closing))
    except NotYet:  # there is none
        return None
    except BadFile as error:
        raise BadFile(error.reason, f"{shown(module)}/{WEIGHTS[0]}: {error}", error.hint) from error
    return {name: (str(spec.dtype), spec.shape, reader.tensor_sha256(name)) for name, spec in reader.specs.items()}
