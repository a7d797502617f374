"""The header's parser under random and almost-right input.

It returns a Header or raises BadFile, never anything else; and what it accepts, the safetensors library accepts too,
with the same tensors.
"""

import json
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from projector.errors import BadFile, Reason
from projector.files.header import DTYPES
from projector.files.tensorfile import TensorReader

CORPUS = sorted((Path(__file__).parent / "corpus").glob("*.bin"))
QUICK, LONG = 400, 8_000

seen: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[None]:
    """Says at the end how many inputs were run, and how many of them were accepted."""
    yield
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        words = ", ".join(f"{count} {what}" for what, count in sorted(seen.items()))
        reporter.write_line(f"\nheader fuzz: {seen.total()} inputs: {words}")


def holds(data: bytes) -> None:
    """The invariant of this file, for one input."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            header = TensorReader(file.fileno()).header
        except BadFile as error:
            refused(error)
            return
    seen["accepted"] += 1
    theirs = dict(deserialize(data))
    assert theirs.keys() == header.specs.keys()
    for name, spec in header.specs.items():
        assert tuple(theirs[name]["shape"]) == spec.shape
        assert DTYPES[theirs[name]["dtype"]] == spec.dtype
        begin = header.offsets[name]
        assert bytes(theirs[name]["data"]) == data[begin : begin + spec.nbytes]
    assert sum(spec.nbytes for spec in header.specs.values()) == len(data) - 8 - struct.unpack("<Q", data[:8])[0]


def refused(error: BadFile) -> None:
    seen[error.reason] += 1
    assert error.reason in {Reason.BAD_HEADER, Reason.TRUNCATED, Reason.UNSUPPORTED_DTYPE}
    assert str(error).isprintable()
    assert len(str(error)) < 1000


numbers = st.one_of(
    st.integers(0, 16),
    st.sampled_from([-1, 1 << 31, 1 << 32, 1 << 48, (1 << 48) + 1, 1 << 62, 1 << 63, 1 << 64, 10**400]),
)
odd = st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=3), numbers, st.just([]), st.just({}))
shapes = st.one_of(st.lists(st.integers(0, 3), max_size=3), st.lists(st.one_of(numbers, odd), max_size=4), odd)
offsets = st.one_of(st.tuples(numbers, numbers).map(list), st.lists(odd, max_size=3), odd)
dtypes = st.one_of(st.sampled_from([*DTYPES, "F8_E4M3", "F4", "C64", "U16"]), odd)
entries = st.one_of(
    st.fixed_dictionaries(
        {"dtype": dtypes, "shape": shapes, "data_offsets": offsets}, optional={"extra": odd, "__metadata__": odd}
    ),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), odd),
    odd,
)
TOKENS = [b'"', b"{", b"}", b"[", b"-", b".", b"e0", b",", b"\\"]
names = st.one_of(st.text(max_size=6), st.sampled_from(["w", "__metadata__", "\ud800", "a\x00", "\u202e"]))


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    """A good file: tensors that tile the data, in any order, with any whitespace and metadata."""
    specs = draw(
        st.lists(
            st.tuples(
                st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
                st.sampled_from(list(DTYPES)),
                st.lists(st.integers(0, 3), max_size=3),
            ),
            max_size=4,
            unique_by=lambda spec: spec[0],
        )
    )
    header: dict[str, Any] = {}
    position = 0
    for name, dtype, shape in specs:
        size = DTYPES[dtype].itemsize
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    shuffled = draw(st.permutations(list(header)))
    header = {name: header[name] for name in shuffled}
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2))
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
    encoded = text.encode("utf-8", "surrogatepass") + b" " * draw(st.integers(0, 8))
    return struct.pack("<Q", len(encoded)) + encoded + bytes(position)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """A good file with a few bytes changed, taken out, put in or doubled; its length is mended half of the time."""
    data = bytearray(draw(valid_files()))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(data)))
        piece = draw(st.one_of(st.binary(max_size=3), st.sampled_from(TOKENS)))
        width = draw(st.integers(0, 3))
        data[place : place + width] = piece
    if draw(st.booleans()) and len(data) > 8:
        end = data.rfind(b"}") + 1
        data[:8] = struct.pack("<Q", max(0, end - 8))
    return bytes(data)


@st.composite
def structured_files(draw: st.DrawFn) -> bytes:
    """JSON of about the right form with values of every wrong kind."""
    header = draw(st.one_of(st.dictionaries(names, entries, max_size=3), odd))
    text = json.dumps(header, ensure_ascii=True).encode()
    return struct.pack("<Q", len(text)) + text + bytes(draw(st.integers(0, 64)))


KINDS = {
    "random bytes": st.binary(max_size=200),
    "a framed random header": st.binary(max_size=100).map(lambda text: struct.pack("<Q", len(text)) + text),
    "valid": valid_files(),
    "mutated": mutated_files(),
    "structured": structured_files(),
}


def run(kind: str, count: int) -> None:
    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(KINDS[kind])
    def inner(data: bytes) -> None:
        holds(data)

    inner()


@pytest.mark.parametrize("kind", KINDS)
def test_a_header_or_a_refusal(kind: str) -> None:
    run(kind, QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_a_header_or_a_refusal_for_long(kind: str) -> None:
    run(kind, LONG)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus(path: Path) -> None:
    """Inputs that told the two readers apart, or came close; a name's first word is what must become of it."""
    before = seen["accepted"]
    holds(path.read_bytes())
    assert (seen["accepted"] > before) == path.stem.startswith("good"), "its name says otherwise"


def test_single_bits_of_a_good_file() -> None:
    """Every bit of a header flipped, one at a time."""
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"k": "v"}}
    text = json.dumps(header).encode()
    good = struct.pack("<Q", len(text)) + text + random.Random(0).randbytes(8)
    for bit in range(8 * (8 + len(text))):
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        holds(bytes(data))


def test_every_prefix_of_a_good_file() -> None:
    text = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    good = struct.pack("<Q", len(text)) + text + bytes(8)
    before = seen["accepted"]
    for length in range(len(good)):
        holds(good[:length])
    assert seen["accepted"] == before
    holds(good)
    assert seen["accepted"] == before + 1


def test_the_corpus_is_there() -> None:
    assert len(CORPUS) >= 12
