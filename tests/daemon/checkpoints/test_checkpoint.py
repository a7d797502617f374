"""Opening checkpoints in every layout. The hostile ones are in tests/attacks; this must work."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.checkpoints.checkpoint import OpenCheckpoint, open_checkpoint, open_path
from daemon.errors import NotYet, Reason, Refused
from tests.models import read_weights, write_base

INDEX = "model.safetensors.index.json"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_base(tmp_path / "x.safetensors", seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "x", seed=1)


@pytest.fixture
def sharded(tmp_path: Path, file: Path) -> Path:
    """Three shards, each with every third tensor."""
    weights = load_file(file)
    path = tmp_path / "sharded"
    path.mkdir()
    names = sorted(weights)
    placed = {name: f"part-{n % 3}.safetensors" for n, name in enumerate(names)}
    for part in set(placed.values()):
        save_file({name: weights[name] for name in names if placed[name] == part}, path / part)
    (path / INDEX).write_text(json.dumps({"weight_map": placed}))
    return path


@contextmanager
def opened(path: Path, needs: tuple[str, ...] = (), follow: bool = False) -> Iterator[OpenCheckpoint]:
    """As the daemon opens an entry of its inbox."""
    fd = os.open(path.parent, os.O_RDONLY)
    try:
        with open_checkpoint(fd, path.name, needs=needs, follow=follow) as checkpoint:
            yield checkpoint
    finally:
        os.close(fd)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["file", "folder", "sharded"])
def test_every_layout_gives_the_same_tensors(request: pytest.FixtureRequest, file: Path, kind: str) -> None:
    path: Path = request.getfixturevalue(kind)
    wanted = read_weights(file)
    with opened(path) as checkpoint:
        assert checkpoint.kind == kind
        assert checkpoint.tensors.schema.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(checkpoint.tensors.read(name), tensor)
        files = list(path.glob("*.safetensors")) if path.is_dir() else [path]
        assert checkpoint.size_bytes == sum(one.stat().st_size for one in files)


def test_the_identity_of_one_file_is_its_sha256_wherever_it_lies(file: Path, folder: Path) -> None:
    shutil.copy(file, folder / "model.safetensors")
    with opened(file) as plain, opened(folder) as inside:
        assert plain.identity() == inside.identity() == sha256(file)


def test_the_identity_of_shards_is_that_of_their_listing(sharded: Path) -> None:
    parts = sorted(sharded.glob("*.safetensors"))
    listing = "".join(f"{sha256(part)}  {part.name}\n" for part in parts)
    with opened(sharded) as checkpoint:
        assert checkpoint.identity() == hashlib.sha256(listing.encode()).hexdigest()


def test_a_folder_may_hold_its_one_file_under_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    (folder / ".hidden.safetensors").write_bytes(b"")
    with opened(folder) as checkpoint:
        assert checkpoint.kind == "folder"


def test_the_plain_file_wins_over_an_index_and_over_pickles(folder: Path) -> None:
    (folder / INDEX).write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with opened(folder) as checkpoint:
        assert checkpoint.kind == "folder"


def test_the_descriptor_counts_not_the_name(file: Path) -> None:
    wanted = read_weights(file)
    with opened(file) as checkpoint:
        file.rename(file.with_name("elsewhere"))
        write_base(file, seed=2)
        assert torch.equal(checkpoint.tensors.read("embed_tokens.weight"), wanted["embed_tokens.weight"])
        assert not checkpoint.unchanged()


@pytest.mark.parametrize("change", ["append", "overwrite", "touch", "rename", "unlink"])
def test_every_change_is_noticed(file: Path, change: str) -> None:
    with opened(file) as checkpoint:
        assert checkpoint.unchanged()
        if change == "append":
            with file.open("ab") as stream:
                stream.write(b"x")
        elif change == "overwrite":
            with file.open("r+b") as stream:
                stream.write(b"x")
        elif change == "touch":
            os.utime(file)
        elif change == "rename":
            file.rename(file.with_name("y.safetensors"))
        else:
            file.unlink()
        assert not checkpoint.unchanged()


def test_a_missing_shard_may_still_come(sharded: Path) -> None:
    (sharded / "part-1.safetensors").unlink()
    with pytest.raises(NotYet, match=r"1 of 3 shards are missing: part-1\.safetensors$") as waiting, opened(sharded):
        pass
    assert waiting.value.reason is Reason.INCOMPLETE


@pytest.mark.parametrize("keep", [0, 7, 100, 3000])
def test_a_file_cut_short_may_still_grow(file: Path, keep: int) -> None:
    os.truncate(file, keep)
    with pytest.raises(NotYet), opened(file):
        pass


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580, 0x10480])
def test_a_header_whose_length_begins_as_a_pickle_does_is_a_header(file: Path, length: int) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    file.write_bytes(length.to_bytes(8, "little") + json.dumps({"w": entry}).encode().ljust(length) + bytes(8))
    with opened(file) as checkpoint:
        assert list(checkpoint.tensors.schema) == ["w"]


def test_what_vanished_may_come_again(tmp_path: Path) -> None:
    with pytest.raises(NotYet) as waiting, opened(tmp_path / "gone.safetensors"):
        pass
    assert waiting.value.reason is Reason.CHANGED


def test_a_sidecar_that_is_needed_is_waited_for_and_is_no_part_of_the_identity(folder: Path, file: Path) -> None:
    with opened(folder) as checkpoint:
        alone = checkpoint.identity()
        assert checkpoint.sidecar_digests() == {}
    with pytest.raises(NotYet) as waiting, opened(folder, needs=("fisher",)):
        pass
    assert waiting.value.reason is Reason.MISSING_SIDECAR
    shutil.copy(file, folder / "fisher.safetensors")
    with opened(folder, needs=("fisher",)) as checkpoint:
        assert checkpoint.identity() == alone
        assert checkpoint.sidecar_digests() == {"fisher": sha256(file)}
    with pytest.raises(Refused) as refused, opened(file, needs=("fisher",)):
        pass
    assert refused.value.reason is Reason.MISSING_SIDECAR


def test_links_are_followed_only_where_the_person_named_them(tmp_path: Path, folder: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to("../blob")  # as the hub's cache has it
    with open_path(link) as checkpoint:
        assert checkpoint.kind == "folder"
    for path in (link, folder):
        with pytest.raises(Refused) as refused, opened(path):
            pass
        assert refused.value.reason is Reason.SYMLINK


def test_nothing_stays_open(file: Path, sharded: Path) -> None:
    def descriptors() -> set[str]:
        return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_link(fd)}

    def _is_link(fd: str) -> bool:
        return os.path.lexists(f"/proc/self/fd/{fd}")

    before = descriptors()
    with opened(file), opened(sharded):
        assert len(descriptors()) > len(before)
    (sharded / INDEX).write_text('{"weight_map": {"w": "part-0.safetensors"}}')
    with pytest.raises(Refused), opened(sharded):
        pass
    assert not [name for name in descriptors() if str(sharded.parent) in name]
