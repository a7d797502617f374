"""The files of the cache, which several processes fill together.

A file appears whole. What one process is making, the others leave to it and go on with what is next; they wait only
for what they cannot do without.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Tensors, whole at once, so that what is there is good."""
    with _whole(path) as part:
        save_file({name: value.contiguous() for name, value in tensors.items()}, part)


def note(said: Any, path: Path) -> None:
    """JSON, in the same way."""
    with _whole(path) as part:
        part.write_text(json.dumps(said))


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Whether it is for this process to make a file or folder; False, or with `wait` later, where another is at it.

    A claim ends with its process, however that ends.
    """
    claim = path.with_name(f".{path.name}.claim")
    claim.parent.mkdir(parents=True, exist_ok=True)
    with claim.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def make_once(path: Path, make: Callable[[], Any], *, wait: bool = True) -> bool:
    """Whether it is there now, as before or made by `make`. Without wait: False while another process makes it."""
    if not path.exists():
        with claimed(path, wait=wait) as mine:
            if mine and not path.exists():
                make()
    return path.exists()


def make_all(makers: Mapping[Path, Callable[[], Any]]) -> None:
    """Until all are there: first those that nobody else is making, then what remains of them."""
    for wait in (False, True):
        for path, make in makers.items():
            make_once(path, make, wait=wait)


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".part-{os.getpid()}")
    yield part
    part.rename(path)
