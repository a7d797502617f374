"""The header's parser and builder against the safetensors library: what either writes, the other reads."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from projector.errors import BadFile, Reason
from projector.files.header import DTYPES, MAX_HEADER_BYTES, PREFIX_BYTES, build_header, header_length, parse_header
from projector.spec import TensorSpec

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
specs = st.lists(
    st.builds(
        TensorSpec,
        name=names,
        shape=st.lists(st.integers(0, 4), max_size=4).map(tuple),
        dtype=st.sampled_from(list(DTYPES.values())),
    ),
    max_size=6,
    unique_by=lambda spec: spec.name,
)
metadata = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=6), names, max_size=3)


def opened(header: Any, size: int = 0) -> Any:
    """`header` as JSON, parsed for a file with `size` bytes of data."""
    text = json.dumps(header).encode()
    return parse_header(text, PREFIX_BYTES + len(text) + size)


@settings(max_examples=200)
@given(specs, metadata)
def test_what_we_build_we_and_the_library_read(specs: list[TensorSpec], metadata: dict[str, str]) -> None:
    opening, built = build_header(specs, metadata)
    assert len(opening) % 8 == 0
    parsed = parse_header(opening[PREFIX_BYTES:], built.size)
    assert dict(parsed.specs) == {spec.name: spec for spec in specs}
    assert parsed.offsets == built.offsets
    assert parsed.metadata == metadata
    assert parsed.size == built.size == len(opening) + sum(spec.nbytes for spec in specs)
    theirs = dict(deserialize(opening + bytes(built.size - len(opening))))
    assert theirs.keys() == parsed.specs.keys()
    for spec in specs:
        assert tuple(theirs[spec.name]["shape"]) == spec.shape
        assert DTYPES[theirs[spec.name]["dtype"]] == spec.dtype
        assert built.offsets[spec.name] % spec.dtype.itemsize == 0 or not spec.nbytes


def test_specs_come_in_the_order_of_their_data() -> None:
    entries = {
        "last": {"dtype": "U8", "shape": [2], "data_offsets": [5, 7]},
        "first": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
        "empty": {"dtype": "F32", "shape": [0, 9], "data_offsets": [4, 4]},
        "middle": {"dtype": "BOOL", "shape": [1, 1], "data_offsets": [4, 5]},
    }
    assert list(opened(entries, 7).specs) == ["first", "empty", "middle", "last"]


def test_whitespace_and_unaligned_data_are_taken() -> None:
    text = b' \n{ "w" : {"shape":[1], "dtype":"F64", "data_offsets":[0,8]} }\t   '
    header = parse_header(text, PREFIX_BYTES + len(text) + 8)
    assert header.offsets == {"w": PREFIX_BYTES + len(text)}
    assert header.offsets["w"] % 8 != 0


def test_a_file_without_a_tensor_is_a_file() -> None:
    assert not opened({}).specs
    assert opened({"__metadata__": {"format": "pt"}}).metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("prefix", "file_size", "reason"),
    [
        (b"", 0, Reason.TRUNCATED),
        (b"\x02\0\0\0\0\0\0", 7, Reason.TRUNCATED),
        (struct.pack("<Q", 2), 9, Reason.TRUNCATED),
        (struct.pack("<Q", 100), 107, Reason.TRUNCATED),
        (struct.pack("<Q", 0), 4096, Reason.TRUNCATED),  # reserved, not yet written
        (struct.pack("<Q", 1), 100, Reason.BAD_HEADER),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1), 1 << 40, Reason.BAD_HEADER),
        (struct.pack("<Q", 1 << 63), 1 << 40, Reason.BAD_HEADER),
    ],
)
def test_a_wrong_header_length(prefix: bytes, file_size: int, reason: Reason) -> None:
    with pytest.raises(BadFile) as caught:
        header_length(prefix, file_size)
    assert caught.value.reason is reason


def test_the_longest_header_length() -> None:
    assert header_length(struct.pack("<Q", 2), 10) == 2
    assert header_length(struct.pack("<Q", MAX_HEADER_BYTES), 1 << 30) == MAX_HEADER_BYTES


def test_a_real_file_of_the_library(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"é\n": torch.zeros(2, 3), "b": torch.zeros(())}, tmp_path / "x", metadata={"k": "v"})
    data = (tmp_path / "x").read_bytes()
    length = header_length(data[:8], len(data))
    header = parse_header(data[8 : 8 + length], len(data))
    assert header.specs == {
        "b": TensorSpec("b", (), torch.float32),
        "é\n": TensorSpec("é\n", (2, 3), torch.float32),
    }
    assert header.metadata == {"k": "v"}
