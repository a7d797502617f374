"""Reading and writing one file: byte for byte against the safetensors library, and the digest against hashlib."""

import hashlib
import itertools
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from projector.driver.fold import Driver
from projector.driver.head import HeadFold
from projector.driver.steps import state_specs
from projector.errors import BadFile, Reason
from projector.files.header import DTYPES
from projector.files.source import Checkpoint
from projector.files.tensorfile import RunningDigest, TensorReader, TensorWriter
from projector.method import Contribution, Totals
from projector.methods import make
from projector.spec import TensorSpec


@pytest.fixture
def file() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as opened:
        yield opened


def random_tensors(seed: int) -> dict[str, Tensor]:
    """Up to eight tensors with random names, shapes, dtypes and bits (NaN among them), in random order."""
    rng = random.Random(seed)
    found = {}
    for index in range(rng.randint(0, 8)):
        shape = [rng.choice([0, 1, 2, 3, 7]) for _ in range(rng.randint(0, 4))]
        dtype = rng.choice(list(DTYPES.values()))
        count = torch.Size(shape).numel()
        if dtype == torch.bool:
            found[f"{index} é"] = torch.tensor([rng.random() < 0.5 for _ in range(count)], dtype=dtype).reshape(shape)
        else:
            data = torch.tensor(list(rng.randbytes(count * dtype.itemsize)), dtype=torch.uint8)
            found[f"{index}.w"] = data.view(dtype).reshape(shape)
    order = sorted(found, key=lambda _: rng.random())
    return {name: found[name] for name in order}


def same_bits(ours: Tensor, theirs: Tensor) -> bool:
    def bits(x: Tensor) -> bytes:
        return bytes(x.contiguous().reshape(-1).view(torch.uint8).tolist())

    return (ours.dtype, ours.shape, bits(ours)) == (theirs.dtype, theirs.shape, bits(theirs))


def specs_of(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]


@pytest.mark.parametrize("seed", range(40))
def test_we_read_what_the_library_wrote(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(seed)
    save_file(tensors, tmp_path / "x", metadata={"seed": str(seed)})
    with (tmp_path / "x").open("rb") as opened:
        reader = TensorReader(opened.fileno(), RunningDigest(opened.fileno()))
        assert reader.specs.keys() == tensors.keys()
        for name in random.Random(seed).sample(list(tensors), len(tensors)):
            assert same_bits(reader.read(name), tensors[name]), name
        assert reader.header.metadata == {"seed": str(seed)}
        assert reader.sha256() == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


@pytest.mark.parametrize("seed", range(40))
def test_the_library_reads_what_we_wrote_in_any_order(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(seed)
    with (tmp_path / "x").open("w+b") as opened:
        writer = TensorWriter(opened.fileno(), specs_of(tensors), {"a": "b"} if seed % 2 else {})
        for name in random.Random(seed).sample(list(tensors), len(tensors)):
            writer.write(name, tensors[name])
        digest = writer.finish()
    theirs = load_file(tmp_path / "x")
    assert theirs.keys() == tensors.keys()
    assert all(same_bits(theirs[name], tensor) for name, tensor in tensors.items())
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_both_write_the_same_bytes_of_data(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 2), "a": torch.arange(4)}
    save_file(tensors, tmp_path / "theirs")
    with (tmp_path / "ours").open("w+b") as opened:
        writer = TensorWriter(opened.fileno(), specs_of(tensors), {})
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    data = 4 * 8 + 6 * 4
    assert (tmp_path / "ours").read_bytes()[-data:] == (tmp_path / "theirs").read_bytes()[-data:]


def test_rows_are_read_and_written(file: IO[bytes]) -> None:
    tensor = torch.randn(7, 3, 2)
    writer = TensorWriter(file.fileno(), [TensorSpec("w", (7, 3, 2), torch.float32)], {})
    for start in (4, 0, 2, 6):
        writer.write("w", tensor[start : min(start + 2, 7)], start)
    digest = writer.finish()
    assert digest == hashlib.sha256(file.read()).hexdigest()
    reader = TensorReader(file.fileno())
    assert torch.equal(reader.read("w"), tensor)
    for start, stop in itertools.combinations_with_replacement(range(8), 2):
        assert torch.equal(reader.read("w", slice(start, stop)), tensor[start:stop])


def test_what_is_not_contiguous_is_written_in_its_logical_order(file: IO[bytes]) -> None:
    tensor = torch.randn(3, 5).T
    writer = TensorWriter(file.fileno(), [TensorSpec("w", (5, 3), torch.float32)], {})
    writer.write("w", tensor)
    assert torch.equal(TensorReader(file.fileno()).read("w"), tensor)


@pytest.mark.parametrize(
    ("tensor", "start"),
    [
        (torch.zeros(4, 3), 1),
        (torch.zeros(5, 3), 0),
        (torch.zeros(3, 4), 0),
        (torch.zeros(12), 0),
        (torch.zeros(()), 0),
        (torch.zeros(4, 3, 1), 0),
        (torch.zeros(4, 3, dtype=torch.float64), 0),
    ],
    ids=str,
)
def test_a_tensor_that_does_not_fit_its_spec_is_never_written(file: IO[bytes], tensor: Tensor, start: int) -> None:
    names = ["before", "w", "after"]
    writer = TensorWriter(file.fileno(), [TensorSpec(name, (4, 3), torch.float32) for name in names], {})
    for name in names:
        writer.write(name, torch.ones(4, 3))
    with pytest.raises(ValueError, match="its spec says"):
        writer.write("w", tensor, start)
    reader = TensorReader(file.fileno())
    assert all(torch.equal(reader.read(name), torch.ones(4, 3)) for name in names)


def test_a_file_truncated_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1000), "b": torch.zeros(1000)}, tmp_path / "x")
    with (tmp_path / "x").open("r+b") as opened:
        reader = TensorReader(opened.fileno(), RunningDigest(opened.fileno()))
        reader.read("a")
        os.ftruncate(opened.fileno(), reader.header.size - 1)
        with pytest.raises(BadFile) as caught:
            reader.read("b")
        assert caught.value.reason is Reason.TRUNCATED
        with pytest.raises(BadFile):
            reader.sha256()


def test_data_that_is_not_aligned(file: IO[bytes]) -> None:
    tensor = torch.randn(2, 3, dtype=torch.float64)
    text = b'{"w":{"dtype":"F64","shape":[2,3],"data_offsets":[0,48]}} '
    assert (8 + len(text)) % 8
    file.write(len(text).to_bytes(8, "little") + text + tensor.numpy().tobytes())
    file.flush()
    reader = TensorReader(file.fileno())
    assert torch.equal(reader.read("w"), tensor)
    assert torch.equal(reader.read("w", slice(1, 2)), tensor[1:])


def test_a_reader_without_a_digest_has_no_sha256(file: IO[bytes]) -> None:
    TensorWriter(file.fileno(), [], {})
    with pytest.raises(ValueError, match="no digest"):
        TensorReader(file.fileno()).sha256()


@settings(max_examples=150)
@given(st.binary(max_size=300), st.randoms(use_true_random=False), st.booleans())
def test_the_running_digest_is_that_of_hashlib(data: bytes, rng: random.Random, partial: bool) -> None:
    """Fed sequentially, backwards, interleaved, in part or not at all, with pieces that overlap."""
    with tempfile.TemporaryFile() as opened:
        opened.write(data)
        opened.flush()
        digest = RunningDigest(opened.fileno())
        for _ in range(rng.randint(0, 8) if partial else 40):
            start = rng.randint(0, len(data))
            digest.feed(start, memoryview(data)[start : start + rng.randint(0, 60)])
        assert digest.finish(len(data)) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("order", ["forward", "backward", "evens first", "every third", "none"])
def test_the_running_digest_in_order(order: str, file: IO[bytes]) -> None:
    data = random.Random(0).randbytes(1000)
    file.write(data)
    file.flush()
    pieces = {
        "forward": range(0, 1000, 10),
        "backward": range(990, -1, -10),
        "evens first": [*range(0, 1000, 20), *range(10, 1000, 20)],
        "every third": range(0, 1000, 30),
        "none": [],
    }[order]
    digest = RunningDigest(file.fileno())
    for start in pieces:
        digest.feed(start, memoryview(data)[start : start + 10])
    assert digest.finish(1000) == hashlib.sha256(data).hexdigest()


def test_a_fold_of_an_expert_in_another_order_hashes_what_it_wrote(tmp_path: Path) -> None:
    """The state lies in the base's order and is written in the expert's; in blocks, several accumulators alternate."""
    base = {name: torch.randn(6, 4) for name in "abcd"}
    save_file(base, tmp_path / "base")
    method = make("mean")
    with (tmp_path / "base").open("rb") as origin, (tmp_path / "expert").open("w+b") as other:
        names = ["d", "b", "a", "c"]
        writer = TensorWriter(other.fileno(), specs_of({name: base[name] for name in names}), {})
        for name in names:
            writer.write(name, base[name] + 1)
        schema = Checkpoint([TensorReader(origin.fileno())])
        with (tmp_path / "state").open("w+b") as after:
            state = TensorWriter(after.fileno(), state_specs(method, schema.schema), {})
            source = Checkpoint([TensorReader(other.fileno())])
            assert list(source.order) == names
            head = HeadFold(method, Totals(), Contribution(1), None, state)
            Driver(block_bytes=32).fold(schema, source, [head])
            digest = state.finish()
    assert digest == hashlib.sha256((tmp_path / "state").read_bytes()).hexdigest()


def test_tensors_written_in_turns_are_hashed_as_they_lie(file: IO[bytes]) -> None:
    specs = [TensorSpec(name, (6, 4), torch.float32) for name in "ab"] + [TensorSpec("none", (0,), torch.float32)]
    writer = TensorWriter(file.fileno(), specs, {})
    for start in range(0, 6, 2):
        for name in "ab":
            writer.write(name, torch.randn(2, 4), start)
    writer.write("none", torch.zeros(0))
    assert writer.finish() == hashlib.sha256(_contents(file)).hexdigest()


def test_a_writer_that_began_again_hashes_what_it_wrote_last(file: IO[bytes]) -> None:
    writer = TensorWriter(file.fileno(), [TensorSpec(name, (6, 4), torch.float32) for name in "ab"], {})
    writer.write("a", torch.zeros(6, 4))
    writer.write("b", torch.zeros(3, 4), 3)
    writer.restart()
    for name in "ab":
        writer.write(name, torch.ones(6, 4))
    assert writer.finish() == hashlib.sha256(_contents(file)).hexdigest()
    assert TensorReader(file.fileno()).read("a").eq(1).all()


def _contents(file: IO[bytes]) -> bytes:
    file.seek(0)
    return file.read()
