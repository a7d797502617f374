"""The strict safetensors header: bytes in, specs and offsets out. Everything that decides what a file may say is here.

A file is 8 bytes (header length n, little-endian), n bytes of JSON, then the data. The JSON maps names to
{"dtype", "shape", "data_offsets": [begin, end)}; the ranges must tile the data exactly, in any order. The stock reader
is laxer (duplicate keys, NaN, huge shapes); what passes here passes there.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from projector.errors import BadFile, Reason
from projector.names.quantised import hint
from projector.spec import TensorSpec
from projector.text import once_each, shown

PREFIX_BYTES = 8
ALIGNMENT = 8  # of the data
MAX_HEADER_BYTES = 16 << 20  # about 100,000 tensors; the format's own limit (100 MB) would break the memory promise
MAX_NUMEL = 1 << 48

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Header:
    """Where everything is in one file: specs in the order of their data, absolute offsets, the exact size."""

    specs: Mapping[str, TensorSpec]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    size: int


def header_length(prefix: bytes, file_size: int) -> int:
    """The header's length in bytes from the file's first 8. Raises BadFile."""
    if len(prefix) < PREFIX_BYTES:
        raise _truncated(f"the file has {file_size} bytes, a safetensors file at least {PREFIX_BYTES + 2}")
    length = int.from_bytes(prefix, "little")
    if not length:
        raise _truncated("the file begins with zeros: its space is reserved, but nothing is written yet")
    if length > MAX_HEADER_BYTES:
        raise _bad(f"the header would have {length} bytes, more than {MAX_HEADER_BYTES}")
    if length < 2:
        raise _bad(f"the header would have {length} bytes")
    if PREFIX_BYTES + length > file_size:
        raise _truncated(f"the header ends at byte {PREFIX_BYTES + length}, the file at {file_size}")
    return length


def parse_header(text: bytes, file_size: int) -> Header:
    """Checks the JSON header `text` of a file of `file_size` bytes. Raises BadFile, never anything else."""
    entries = _load(text)
    metadata = _metadata(entries.pop("__metadata__", {}))
    ranges = sorted(_entry(name, entry) for name, entry in entries.items())
    start = PREFIX_BYTES + len(text)
    position = 0
    for begin, end, _, spec in ranges:
        if begin != position:
            what = "overlaps the tensor before it" if begin < position else "leaves a hole before it"
            raise _bad(f"{shown(spec.name)} {what}")
        position = end
    if start + position > file_size:
        raise _truncated(f"the data ends at byte {start + position}, the file at {file_size}")
    if start + position < file_size:
        raise _bad(f"{file_size - start - position} bytes follow the last tensor")
    return Header(
        specs={spec.name: spec for *_, spec in ranges},
        offsets={spec.name: start + begin for begin, _, _, spec in ranges},
        metadata=metadata,
        size=file_size,
    )


def build_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The bytes that open a file with these tensors (length prefix included), and their places.

    Larger item sizes come first, as the stock writer has it, so that every tensor is aligned to its dtype.
    """
    ordered = sorted(specs, key=lambda spec: -spec.dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offsets: dict[str, int] = {}
    position = 0
    for spec in ordered:
        offsets[spec.name] = position
        position += spec.nbytes
        entries[spec.name] = _described(spec, offsets[spec.name], position)
    text = _dump(entries)
    text += b" " * (-len(text) % ALIGNMENT)
    start = PREFIX_BYTES + len(text)
    header = Header(
        specs={spec.name: spec for spec in ordered},
        offsets={name: start + offset for name, offset in offsets.items()},
        metadata=metadata,
        size=start + position,
    )
    return len(text).to_bytes(PREFIX_BYTES, "little") + text, header


def room(spec: TensorSpec, most: int) -> int:
    """The bytes that a tensor takes in a file of at most `most` bytes: its data, and its entry in the header."""
    return spec.nbytes + len(_dump({spec.name: _described(spec, most, most)}))


def _described(spec: TensorSpec, begin: int, end: int) -> dict[str, Any]:
    return {"dtype": NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}


def _dump(entries: Mapping[str, Any]) -> bytes:
    return json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()


def _load(text: bytes) -> dict[str, Any]:
    try:
        loaded = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_constant=_refuse_number,
            parse_float=_refuse_number,
        )
    except BadFile:
        raise
    except (ValueError, RecursionError) as error:
        raise _bad(f"the header is not JSON: {shown(str(error))}") from None
    if not isinstance(loaded, dict):
        raise _bad("the header is not a JSON object")
    return loaded


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = once_each(lambda: _bad("the header names a key twice"))(pairs)
    words = [*entries, *(value for value in entries.values() if isinstance(value, str))]
    "".join(words).encode()  # a lone surrogate is no text: UnicodeEncodeError
    return entries


def _natural(text: str) -> int:
    return _refuse_number(text) if text.startswith("-") else int(text)  # the stock reader refuses even -0


def _refuse_number(text: str) -> NoReturn:
    raise _bad(f"the header holds {shown(text)}, where only whole numbers from 0 belong")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _bad("__metadata__ is not a map of strings")
    return value


def _entry(name: str, entry: Any) -> tuple[int, int, str, TensorSpec]:
    """One tensor's (begin, end, name, spec): sorts by place, with empty tensors before what starts where they are."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _bad(f"{shown(name)} does not have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _bad(f"{shown(name)} has a dtype that is not a string")
    if dtype not in DTYPES:
        raise BadFile(
            Reason.UNSUPPORTED_DTYPE,
            f"{shown(name)} has dtype {shown(dtype)}",
            "complex numbers cannot be merged: leave it out, if it follows from the configuration as freqs_cis does"
            if dtype.startswith("C")
            else f"save it as F32, F16, BF16 or F64; {hint('FP8' if dtype.startswith('F8') else '')}",
        )
    if not _whole_numbers(shape):
        raise _bad(f"{shown(name)} has a shape that is not a list of whole numbers from 0")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(f"{shown(name)} has data_offsets that are not [begin, end]")
    numel = 1
    for side in shape:
        numel *= side
        if numel > MAX_NUMEL or side > MAX_NUMEL:
            raise _bad(f"{shown(name)} would have more than {MAX_NUMEL} elements")
    spec = TensorSpec(name, tuple(shape), DTYPES[dtype])
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise _bad(f"{shown(name)} spans {end - begin} bytes, its shape and dtype need {spec.nbytes}")
    return begin, end, name, spec


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value)


def _bad(detail: str) -> BadFile:
    return BadFile(Reason.BAD_HEADER, detail, "write the file again with the safetensors library")


def _truncated(detail: str) -> BadFile:
    return BadFile(Reason.TRUNCATED, detail, "copy the file again, whole")
