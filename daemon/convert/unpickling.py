"""The only file that unpickles. It runs as a process of its own, `python -m daemon.convert.unpickling JOB`, and nothing
of the daemon imports it: confining.py starts it, tells it what to do in JSON, and checks what it wrote.

It first gives up what it does not need (memory, time, processes, files), then loads the checkpoint with torch's
weights-only unpickler, which builds tensors and plain containers and calls nothing that is not on its list, and writes
the tensors one by one into the descriptor it was given. What it has to say goes to its standard output, a line of JSON
each: {"done", "total"} in bytes, and at last {"report"} or {"refused"}.
"""

import ctypes
import json
import os
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from daemon.convert.state_dicts import ONLY_WEIGHTS, find_weights, left_out_of, named_tensors, shared_storages
from daemon.errors import Reason, Refused
from projector.errors import Reason as ProjectorReason
from projector.files.tensorfile import TensorWriter
from projector.spec import TensorSpec
from projector.text import shown

METADATA = {"format": "pt"}
BLOCK_BYTES = 32 << 20
NICENESS = 10
OPEN_FILES = 16
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # <sys/prctl.h>

ZIP, LFS = b"PK\x03\x04", b"version https://git-lfs"
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that opens what torch.save wrote before version 1.6
TAR_AT, TAR = 257, b"ustar"
PROTOCOLS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
GLOBAL = re.compile(r"GLOBAL (\S+)")


@dataclass(frozen=True)
class Job:
    """What to convert: descriptors of the file and of the one to write, limits in bytes and seconds, and options.

    parent: the process that asked for it, without which it is not done.
    """

    parent: int
    source: int
    target: int
    memory_bytes: int
    most_bytes: int
    seconds: int
    key: str | None
    strip_prefix: str


def main(job: Job) -> int:
    """Does the job and says so on standard output; the exit status."""
    confine(job)
    try:
        _say({"report": convert(job, lambda done, total: _say({"done": done, "total": total}))})
        return 0
    except Refused as error:
        refused = error
    except OSError as error:
        refused = Refused(Reason.CONVERT, f"it cannot be written: {error.strerror}", "make room on the disk")
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        refused = Refused(Reason.CONVERT, "it needs more memory than it was given", "give it more with --memory")
    _say({"refused": [str(refused.reason), str(refused), refused.hint]})
    return 1


def confine(job: Job) -> None:
    """Gives up, for good, what the work does not need. Where the system knows a limit not, the others remain."""
    torch.set_num_threads(1)
    os.nice(NICENESS)
    library = ctypes.CDLL(None)
    library.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != job.parent:  # it died while torch was imported
        sys.exit(1)
    library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for which, most in (
        (resource.RLIMIT_AS, _mapped_bytes() + job.memory_bytes),
        (resource.RLIMIT_FSIZE, job.most_bytes),
        (resource.RLIMIT_CPU, job.seconds),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(which)[1]
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(which, (limit, limit))


def convert(job: Job, tell: Callable[[int, int], None]) -> dict[str, Any]:
    """Loads and writes; what it did, as JSON can say it. Raises Refused."""
    with os.fdopen(job.source, "rb") as file:
        kind = _kind(file)
        loaded = _load(file)
    weights, inside, left_out = find_weights(loaded, job.key)
    del loaded
    tensors, stripped = named_tensors(weights, job.strip_prefix)
    left_out += [left_out_of(inside, name, value) for name, value in weights.items() if not isinstance(value, Tensor)]
    del weights
    shared = shared_storages(tensors)
    # alias -> name, as the safetensors library notes it; here both are written, so that a base may have either
    tied = {alias: group["names"][0] for group in shared if group["identical"] for alias in group["names"][1:]}
    specs = [_spec(name, tensor) for name, tensor in tensors.items()]
    writer = TensorWriter(job.target, specs, {**tied, **METADATA})
    total = writer.header.size
    if total > job.most_bytes:
        raise Refused(
            Reason.CONVERT,
            f"its tensors would take {total} bytes, more than {job.most_bytes}: they repeat the values they hold",
            "save contiguous tensors: {name: tensor.contiguous() for name, tensor in model.state_dict().items()}",
        )
    os.posix_fallocate(job.target, 0, total)
    done = 0
    for name in writer.specs:
        for start, rows in _blocks(tensors[name]):
            done += len(writer.put(name, rows, start)[1])
            tell(done, total)
    return {
        "kind": kind,
        "inside": "/".join(inside),
        "stripped": stripped,
        "shared": shared,
        "left_out": left_out,
    }


def _kind(file: BinaryIO) -> str:
    """One of the two formats of torch.save, "zip" or "legacy". Raises Refused for anything else, by its name."""
    size = os.fstat(file.fileno()).st_size
    opening = os.pread(file.fileno(), 512, 0)
    if not opening.strip(b"\0"):
        raise Refused(
            ProjectorReason.TRUNCATED, "it is empty" if not size else "it begins with zeros", "copy it again, whole"
        )
    if opening.startswith(LFS):
        raise Refused(Reason.LFS_POINTER, "it is a git-lfs pointer, not the file it stands for", "run `git lfs pull`")
    if opening.startswith(ZIP):
        _check_zip(file, size)
        return "zip"
    if opening.startswith(PROTOCOLS):
        if opening[2:].startswith(LEGACY):
            return "legacy"
        raise _foreign("a plain pickle, which torch.save did not write")
    if opening[TAR_AT:].startswith(TAR):
        raise _foreign("a tar archive, as torch.save wrote them before version 0.1.10")
    if opening[8:9] == b"{":
        raise Refused(Reason.CONVERT, "it is a safetensors file already", "let its name end in .safetensors")
    raise _foreign("no file of torch.save")


def _check_zip(file: BinaryIO, size: int) -> None:
    """Raises Refused unless it is an archive as torch.save writes them: nothing compressed, nothing that overlaps."""
    try:
        with ZipFile(file) as archive:
            entries = archive.infolist()
    except (BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise _damaged(error) from None
    last = {entry.filename.rpartition("/")[2] for entry in entries}
    if "constants.pkl" in last:
        raise _foreign("a TorchScript archive, which is a program", "torch.jit.load(path).state_dict()")
    if "data.pkl" not in last:
        raise _foreign("a zip archive that torch.save did not write")
    if any(entry.compress_type for entry in entries):
        raise Refused(Reason.CONVERT, "it is compressed, which torch.save never does", "save it again with torch.save")
    if sum(entry.file_size for entry in entries) > size:
        raise Refused(Reason.CONVERT, "its entries overlap: they say more bytes than it has", "save it again")


def _load(file: BinaryIO) -> Any:
    """What the file holds. Raises Refused, or what `_out_of_memory` knows."""
    file.seek(0)
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        text = str(error)
        if found := GLOBAL.search(text):
            raise Refused(
                Reason.PICKLE,
                f"it asks for {shown(found[1])}, which is not among the things that weights are made of; nothing ran",
                ONLY_WEIGHTS,
            ) from None
        raise Refused(Reason.PICKLE, f"it is no plain state dict: {shown(_said(text))}", ONLY_WEIGHTS) from None
    except Exception as error:  # a hostile file can raise anything here
        if _out_of_memory(error):
            raise
        raise _damaged(error) from None


def _blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of a tensor, a block at a time; the whole of a scalar."""
    values = tensor.detach().resolve_neg()
    if not values.ndim:
        yield 0, values
        return
    rows = max(1, BLOCK_BYTES // max(1, values[:1].numel() * values.itemsize))
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows]


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), tensor.dtype)


def _said(text: str) -> str:
    """What torch found, without its advice to load the file all the same."""
    return text.partition("WeightsUnpickler error:")[2].partition("Check the documentation")[0].strip() or text


def _foreign(what: str, instead: str = "model.state_dict()") -> Refused:
    return Refused(Reason.PICKLE, f"it is {what}", f"save its weights with torch: torch.save({instead}, path)")


def _damaged(error: Exception) -> Refused:
    said = shown((str(error).splitlines() or [type(error).__name__])[0])
    return Refused(ProjectorReason.TRUNCATED, f"it is damaged or cut short: {said}", "copy it again, whole")


def _out_of_memory(error: Exception) -> bool:
    """True for what Python, torch and the C++ library each say where there is no memory left."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error) or "bad_alloc" in str(error)


def _mapped_bytes() -> int:
    """What the process has mapped by now: Python, torch and its libraries."""
    with open("/proc/self/statm", "rb") as file:  # noqa: PTH123
        return int(file.read().split()[0]) * resource.getpagesize()


def _say(line: Mapping[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(Job(**json.loads(sys.argv[1]))))
