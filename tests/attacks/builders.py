"""Hostile files, one builder each: bytes that look like an expert and must be refused, with the reason they must get.

    for name, (build, reasons) in BUILDERS.items(): drop(build())   # then: refused, and why is one of `reasons`

The reasons are words, so that they compare with the projector's enum and with the daemon's. A file in ODD_NAMES has a
well-formed header; it is its tensors that are not those of any base.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from typing import Any

Builder = Callable[[], bytes]

BAD_HEADER = frozenset({"bad_header"})
TRUNCATED = frozenset({"truncated"})
UNSUPPORTED = frozenset({"unsupported_dtype"})
PICKLE = frozenset({"bad_header", "pickle"})  # whoever looks at the first bytes before the header may say so
NOT_THE_BASE = frozenset({"wrong_base", "unexpected_tensor", "missing_tensor"})

BUILDERS: dict[str, tuple[Builder, frozenset[str]]] = {}
ODD_NAMES: set[str] = set()


def framed(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: `header` as it stands where it is bytes, else as JSON; `length` as its prefix claims it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: Any = (2,), begin: Any = 0, end: Any = 8, dtype: Any = "F32") -> dict[str, Any]:
    """One tensor of a header; by default two float32."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [begin, end]}


def attack(reasons: frozenset[str]) -> Callable[[Builder], Builder]:
    """Registers a builder under its name."""

    def register(build: Builder) -> Builder:
        BUILDERS[build.__name__] = build, reasons
        return build

    return register


def _one(name: str, reasons: frozenset[str], header: Any, data: bytes = bytes(8)) -> None:
    """Registers a file that differs from a good one only in its header."""
    BUILDERS[name] = (lambda: framed(header, data)), reasons


# Files of another kind


@attack(PICKLE)
def pickle_protocol_0() -> bytes:
    """Would run a command, were it unpickled."""
    return b"cos\nsystem\n(S'touch mainstem-was-here'\ntR."


@attack(PICKLE)
def pickle_protocol_4() -> bytes:
    body = b"\x8c\x02os\x8c\x06system\x93\x8c\x18touch mainstem-was-here \x85R."
    return b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body


@attack(PICKLE)
def zip_renamed() -> bytes:
    """As torch.save writes: a zip with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/data.pkl", pickle_protocol_0())
        archive.writestr("model/version", "3\n")
    return buffer.getvalue()


@attack(TRUNCATED)
def empty() -> bytes:
    return b""


@attack(TRUNCATED)
def seven_bytes() -> bytes:
    return bytes(7)


@attack(TRUNCATED)
def all_zero() -> bytes:
    return bytes(4096)


@attack(BAD_HEADER)
def all_ones() -> bytes:
    return b"\xff" * 4096


# The header's length


@attack(BAD_HEADER)
def header_length_2_to_63() -> bytes:
    return framed({"w": entry()}, bytes(8), length=1 << 63)


@attack(BAD_HEADER)
def header_length_2_to_64_less_8() -> bytes:
    """Plus the eight bytes of the prefix this wraps round to zero."""
    return framed({"w": entry()}, bytes(8), length=(1 << 64) - 8)


@attack(TRUNCATED)
def header_length_beyond_the_file() -> bytes:
    return framed({"w": entry()}, bytes(8), length=4096)


@attack(BAD_HEADER)
def header_length_into_the_data() -> bytes:
    text = json.dumps({"w": entry()}).encode()
    return framed(text, bytes(8), length=len(text) + 4)


@attack(BAD_HEADER)
def header_length_short() -> bytes:
    text = json.dumps({"w": entry()}).encode()
    return framed(text, bytes(8), length=len(text) - 1)


@attack(TRUNCATED)
def header_length_0() -> bytes:
    return framed(b"", bytes(8))


@attack(BAD_HEADER)
def header_length_1() -> bytes:
    return framed(b"{", bytes(8))


# Large or deep JSON


@attack(BAD_HEADER)
def json_of_40_megabytes() -> bytes:
    return framed(b'{"w":[' + b"0," * (20 << 20) + b"0]}")


@attack(BAD_HEADER)
def json_of_numbers_within_the_limit() -> bytes:
    return framed(b'{"w":[' + b"0," * (1 << 19) + b"0]}")


@attack(BAD_HEADER)
def json_of_objects_within_the_limit() -> bytes:
    return framed(b'{"w":[' + b"{}," * (1 << 18) + b"{}]}")


@attack(BAD_HEADER)
def json_deep_lists() -> bytes:
    return framed(b'{"w":' + b"[" * (1 << 20))


@attack(BAD_HEADER)
def json_deep_objects() -> bytes:
    return framed(b'{"w":' * (1 << 20))


@attack(BAD_HEADER)
def json_deep_and_closed() -> bytes:
    return framed(b'{"w":' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@attack(BAD_HEADER)
def json_number_of_a_million_digits() -> bytes:
    return framed(b'{"w":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,8]}}', bytes(8))


@attack(BAD_HEADER)
def a_million_tensors_of_no_size() -> bytes:
    entries = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(1_000_000))
    return framed(f"{{{entries}}}".encode())


@attack(NOT_THE_BASE)
def many_tensors_of_no_size_within_the_limit() -> bytes:
    entries = ",".join(f'"{i}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(20_000))
    return framed(f"{{{entries}}}".encode())


@attack(BAD_HEADER)
def shape_of_300_000_sides() -> bytes:
    return framed({"w": entry([1] * 300_000, 0, 8)}, bytes(8))


# JSON that is no header

_one("not_json", BAD_HEADER, b"{'w': 1}")
_one("not_utf8", BAD_HEADER, b'{"\xff\xfe": {"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
_one("utf16", BAD_HEADER, json.dumps({"w": entry()}).encode("utf-16"))
_one("byte_order_mark", BAD_HEADER, b"\xef\xbb\xbf" + json.dumps({"w": entry()}).encode())
_one("json_list", BAD_HEADER, [["w", entry()]])
_one("json_null", BAD_HEADER, b"null")
_one("two_json_values", BAD_HEADER, json.dumps({"w": entry()}).encode() * 2)
_one("control_character_in_a_name", BAD_HEADER, b'{"a\nb":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
_one("lone_surrogate_in_a_name", BAD_HEADER, b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')
_one("lone_surrogate_in_metadata", BAD_HEADER, b'{"__metadata__":{"a":"\\udc00"}}', b"")
_one("metadata_is_a_list", BAD_HEADER, {"__metadata__": ["a"], "w": entry()})
_one("metadata_is_null", BAD_HEADER, {"__metadata__": None, "w": entry()})
_one("metadata_is_nested", BAD_HEADER, {"__metadata__": {"a": {"b": "c"}}, "w": entry()})
_one("metadata_is_a_number", BAD_HEADER, {"__metadata__": {"a": 1}, "w": entry()})
_one("entry_is_null", BAD_HEADER, {"w": None})
_one("entry_is_a_list", BAD_HEADER, {"w": ["F32", [2], [0, 8]]})
_one("key_missing", BAD_HEADER, {"w": {"dtype": "F32", "shape": [2]}})
_one("key_unknown", BAD_HEADER, {"w": {**entry(), "__reduce__": "os.system"}})
_one("no_tensor", NOT_THE_BASE, {}, b"")

_FIRST = '"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
_one("duplicate_tensor", BAD_HEADER, f"{{{_FIRST},{_FIRST}}}".encode())
_one("duplicate_tensor_by_escape", BAD_HEADER, f"{{{_FIRST},{_FIRST}}}".replace('"w"', '"\\u0077"', 1).encode())
_TWICE = '"w":{"dtype":"F64","dtype":"F32","shape":[2],"data_offsets":[0,8]}'
_one("duplicate_key_in_an_entry", BAD_HEADER, f"{{{_TWICE}}}".encode())
_one("duplicate_metadata", BAD_HEADER, f'{{"__metadata__":{{}},"__metadata__":{{}},{_FIRST}}}'.encode())

# Places

_one("overlap", BAD_HEADER, {"a": entry(), "b": entry(begin=4, end=12)}, bytes(12))
_one("same_place_twice", BAD_HEADER, {"a": entry(), "b": entry()})
_one("hole_before", BAD_HEADER, {"a": entry(begin=4, end=12)}, bytes(12))
_one("hole_between", BAD_HEADER, {"a": entry(), "b": entry(begin=12, end=20)}, bytes(20))
_one("bytes_after", BAD_HEADER, {"a": entry()}, bytes(9))
_one("polyglot_zip_after", BAD_HEADER, {"a": entry()}, bytes(8) + zip_renamed())
_one("offsets_do_not_fit_the_shape", BAD_HEADER, {"a": entry((3,), 0, 8)})
_one("offsets_turned_round", BAD_HEADER, {"a": entry((2,), 8, 0)})
_one("offsets_one", BAD_HEADER, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8]}})
_one("offsets_three", BAD_HEADER, {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}})
_one("offset_negative", BAD_HEADER, {"a": entry((2,), -8, 0)})
_one("offset_minus_zero", BAD_HEADER, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}')
_one("offset_2_to_64", BAD_HEADER, {"a": entry((2,), 1 << 64, (1 << 64) + 8)})
_one("empty_tensor_in_another", BAD_HEADER, {"a": entry(), "b": entry((0,), 4, 4)})
_one("data_cut_short", TRUNCATED, {"a": entry()}, bytes(7))
_one("data_missing", TRUNCATED, {"a": entry((1 << 20,), 0, 4 << 20)}, b"")

# Numbers

_one("shape_negative", BAD_HEADER, {"a": entry((-1, -2), 0, 8)})
_one("shape_overflows", BAD_HEADER, {"a": entry((1 << 40, 1 << 40), 0, 8)})
_one("shape_wraps_to_two", BAD_HEADER, {"a": entry(((1 << 63) + 1, 2), 0, 8)})
_one("shape_huge_beside_zero", BAD_HEADER, {"a": entry((0, 1 << 62), 0, 0)}, b"")
_one("shape_of_bools", BAD_HEADER, {"a": entry((True, 2), 0, 8)})
_one("shape_of_floats", BAD_HEADER, {"a": entry((2.0,), 0, 8)})
_one("shape_of_words", BAD_HEADER, {"a": entry(("2",), 0, 8)})
_one("shape_nested", BAD_HEADER, {"a": entry(([2],), 0, 8)})
_one("shape_is_a_number", BAD_HEADER, {"a": entry(2, 0, 8)})
_one("shape_is_null", BAD_HEADER, {"a": entry(None, 0, 8)})
_one("offset_is_a_bool", BAD_HEADER, {"a": entry((2,), False, 8)})
_one("offset_is_a_float", BAD_HEADER, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8.0]}}')
_one("offset_has_an_exponent", BAD_HEADER, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8e0]}}')
_one("literal_nan", BAD_HEADER, b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}')
_one("literal_infinity", BAD_HEADER, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,Infinity]}}')
_one("literal_minus_infinity", BAD_HEADER, b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[-Infinity,8]}}')

# Dtypes

for _dtype in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F6_E2M3", "F4", "U16", "U32", "U64", "C64", "f32", "Q4_K"):
    _one(f"dtype_{_dtype}", UNSUPPORTED, {"a": entry(dtype=_dtype)})
_one("dtype_empty", UNSUPPORTED, {"a": entry(dtype="")})
_one("dtype_trailing_space", UNSUPPORTED, {"a": entry(dtype="F32 ")})
_one("dtype_ansi", UNSUPPORTED, {"a": entry(dtype="\x1b[31mF32")})
_one("dtype_of_a_megabyte", UNSUPPORTED, {"a": entry(dtype="F" * (1 << 20))})
_one("dtype_is_a_number", BAD_HEADER, {"a": entry(dtype=32)})
_one("dtype_is_null", BAD_HEADER, {"a": entry(dtype=None)})
_one("dtype_is_a_list", BAD_HEADER, {"a": entry(dtype=["F32"])})

# Names: nothing is wrong with the file, but no base has such a tensor, and its name goes into a message

for _title, _name in {
    "newline": "w\n2024-01-01 INFO merged expert",
    "carriage_return": "w\rall good",
    "nul": "w\x00.weight",
    "ansi": "\x1b[2J\x1b[31mw",
    "parent_folder": "../../../etc/passwd",
    "absolute_path": "/etc/passwd",
    "megabyte": "w" * (1 << 20),
    "right_to_left": "w\u202ethgiew",
    "zero_width": "w\u200b",
    "combining": "w" + "\u0308" * 5000,
    "astral": "\U0001f40b" * 200,
    "html": "<script>alert(1)</script>",
    "format": "%s%n{0.__class__}",
    "quotes": "'; DROP TABLE experts; --",
    "empty": "",
}.items():
    _one(f"name_{_title}", NOT_THE_BASE, {_name: entry()})
    ODD_NAMES.add(f"name_{_title}")
ODD_NAMES |= {"many_tensors_of_no_size_within_the_limit", "no_tensor"}
