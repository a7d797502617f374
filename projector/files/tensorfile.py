"""One safetensors file on a descriptor: read tensors or rows of them by pread, write them piece by piece, hash both.

Never mmap: a file truncated while mapped kills the process, and mapped pages count as resident memory.
The caller owns the descriptors, opens and closes them, and makes them durable.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from projector.errors import BadFile, Reason
from projector.files.header import PREFIX_BYTES, Header, build_header, header_length, parse_header
from projector.files.slabs import empty
from projector.spec import TensorSpec
from projector.watch import SILENT, Watch

CHUNK_BYTES = 4 << 20
Piece = tuple[int, memoryview]
"""Bytes that were written, and where."""


class RunningDigest:
    """The sha256 of a whole file, or of what follows `start` in it, fed in any order and computed front to back.

    What is fed at the frontier is hashed from memory; a gap is first read back from the file, so what lies before
    `offset` must be there already. A file read or written in the order of its data is thus touched once.
    """

    def __init__(self, fd: int, watch: Watch = SILENT, start: int = 0) -> None:
        self._fd = fd
        self._watch = watch
        self._sha256 = hashlib.sha256()
        self._frontier = start

    @property
    def frontier(self) -> int:
        """Up to which byte of the file all is hashed."""
        return self._frontier

    def feed(self, offset: int, data: memoryview) -> None:
        """Takes the bytes at `offset`, unless they lie before the frontier and so were hashed already."""
        end = offset + len(data)
        if end <= self._frontier:
            return
        self.catch_up(offset)
        with self._watch.phase("hash"):
            self._sha256.update(data[self._frontier - offset :])
        self._frontier = end

    def finish(self, end: int) -> str:
        """The digest in hex of the file's bytes before `end`."""
        self.catch_up(end)
        return self._sha256.hexdigest()

    def catch_up(self, offset: int) -> None:
        """Reads back and hashes what lies between the frontier and `offset`."""
        buffer = memoryview(bytearray(min(CHUNK_BYTES, max(0, offset - self._frontier))))
        while self._frontier < offset:
            piece = buffer[: min(len(buffer), offset - self._frontier)]
            with self._watch.phase("read"):
                read_exactly(self._fd, piece, self._frontier)
            with self._watch.phase("hash"):
                self._sha256.update(piece)
            self._frontier += len(piece)


class TensorReader:
    """A safetensors file open for reading. Raises BadFile where the file is not what its header says."""

    def __init__(self, fd: int, digest: RunningDigest | None = None, watch: Watch = SILENT) -> None:
        self._fd = fd
        self._digest = digest
        self._watch = watch
        self._tensors: dict[str, RunningDigest] = {}
        self._digests_tensors = False
        size = os.fstat(fd).st_size
        prefix = bytearray(min(PREFIX_BYTES, size))
        read_exactly(fd, memoryview(prefix), 0)
        text = bytearray(header_length(bytes(prefix), size))
        read_exactly(fd, memoryview(text), PREFIX_BYTES)
        self.header: Header = parse_header(bytes(text), size)
        if digest is not None:
            digest.feed(0, memoryview(prefix + text))

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self.header.specs

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor `name`, or its rows [start, stop), as a fresh tensor in the file's dtype.

        Takes the bytes into the file's digest, and first what lies before them.
        """
        spec = self.header.specs[name]
        start, stop = (rows.start, rows.stop) if rows is not None else (0, spec.shape[0] if spec.shape else 1)
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        row_bytes = spec.row_numel * spec.dtype.itemsize
        offset = self.header.offsets[name] + start * row_bytes
        data = empty((stop - start) * row_bytes)
        view = _bytes(data)
        with self._watch.phase("read"):
            read_exactly(self._fd, view, offset)
        if self._digest is not None:
            self._digest.feed(offset, view)
        if self._digests_tensors:
            self._tensor_digest(name).feed(offset, view)
        return data.view(spec.dtype).reshape(shape)

    def glance(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of the tensor's data, or those that there are of them; the digest passes them by."""
        nbytes = self.header.specs[name].nbytes
        data = bytearray(max(0, min(stop, nbytes) - start))
        with self._watch.phase("read"):
            read_exactly(self._fd, memoryview(data), self.header.offsets[name] + start)
        return bytes(data)

    def digest_tensors(self) -> None:
        """From here on each tensor is also hashed by itself as it is read: `tensor_sha256` then need not read it."""
        self._digests_tensors = True

    def tensor_sha256(self, name: str) -> str:
        """The sha256 of one tensor's bytes; reads what has not been hashed of it."""
        return self._tensor_digest(name).finish(self.header.offsets[name] + self.header.specs[name].nbytes)

    def _tensor_digest(self, name: str) -> RunningDigest:
        if name not in self._tensors:
            self._tensors[name] = RunningDigest(self._fd, self._watch, self.header.offsets[name])
        return self._tensors[name]

    def sha256(self) -> str:
        """The whole file's digest; only of a reader that was given a RunningDigest."""
        if self._digest is None:
            raise ValueError("this reader keeps no digest")
        return self._digest.finish(self.header.size)


class TensorWriter:
    """A safetensors file being written by tensors or rows of them, in any order; fastest in the order of `specs`."""

    def __init__(
        self, fd: int, specs: Sequence[TensorSpec], metadata: Mapping[str, str], watch: Watch = SILENT
    ) -> None:
        self._fd = fd
        self._watch = watch
        self._opening, self.header = build_header(specs, metadata)
        self.restart()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return self.header.specs

    def restart(self) -> None:
        """Begins again: what was written is to be written over."""
        self._digest = RunningDigest(self._fd, self._watch)
        self._ahead: dict[int, int] = {}
        self.hash(self._put(0, memoryview(self._opening)))

    def write(self, name: str, tensor: Tensor, start: int = 0) -> None:
        """Writes rows [start, start + len) of `name`, or all of it, and hashes them. Raises what `put` raises."""
        self.hash(self.put(name, tensor, start))

    def put(self, name: str, tensor: Tensor, start: int = 0) -> Piece:
        """Only writes them, from any thread: what it returns must be hashed, by one thread at a time.

        Raises ValueError where the spec of `name` says otherwise.
        """
        spec = self.header.specs[name]
        same_rows = tensor.ndim == len(spec.shape) and tensor.shape[1:] == spec.shape[1:]
        if not same_rows or (spec.shape and start + len(tensor) > spec.shape[0]):
            raise ValueError(f"{name} is written as {list(tensor.shape)} at {start}, its spec says {list(spec.shape)}")
        if tensor.dtype != spec.dtype:
            raise ValueError(f"{name} is written as {tensor.dtype}, its spec says {spec.dtype}")
        offset = self.header.offsets[name] + start * spec.row_numel * spec.dtype.itemsize
        return self._put(offset, _bytes(tensor.detach().cpu()))

    def hash(self, piece: Piece) -> None:
        """Takes what was put into the digest; cheapest in the order of the file.

        What lies ahead of a gap is read back once the gap is filled.
        """
        offset, data = piece
        if offset > self._digest.frontier:
            self._ahead[offset] = max(offset + len(data), self._ahead.get(offset, 0))  # an empty tensor has no place
            return
        self._digest.feed(offset, data)
        while end := self._ahead.pop(self._digest.frontier, 0):
            self._digest.catch_up(end)

    def reader(self) -> TensorReader:
        """The file as it was just written, for reading."""
        return TensorReader(self._fd, watch=self._watch)

    def finish(self) -> str:
        """The whole file's sha256 in hex. The bytes are written, not yet durable."""
        return self._digest.finish(self.header.size)

    def _put(self, offset: int, data: memoryview) -> Piece:
        with self._watch.phase("write"):
            written = 0
            while written < len(data):
                written += os.pwrite(self._fd, data[written:], offset + written)
        return offset, data


def _bytes(tensor: Tensor) -> memoryview:
    """A CPU tensor's bytes; shared with it where it is contiguous."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_exactly(fd: int, view: memoryview, offset: int) -> None:
    """Fills `view` from the file at `offset`. Raises BadFile, with the descriptor as its `fd`, where the file ends
    first, and OSError, with the descriptor as its `filename`, where it cannot be read.
    """
    done = 0
    while done < len(view):
        try:
            count = os.preadv(fd, [view[done:]], offset + done)
        except OSError as error:
            raise OSError(error.errno, error.strerror, fd) from error
        if count == 0:
            short = BadFile(
                Reason.TRUNCATED,
                f"the file ended at byte {offset + done} while it was read, {len(view) - done} bytes short",
                "copy the file again, whole, and leave it alone until it is merged",
            )
            short.fd = fd
            raise short
        done += count
