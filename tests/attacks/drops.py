"""Hostile drops beside the hostile headers of builders.py: one function each, and the reason it must be refused for.

Each function lays its drop at a path of the inbox, given a sound expert to start from.
"""

import json
import os
import pickle
import shutil
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.attacks.builders import BUILDERS
from tests.models import WEIGHTS

INDEX = "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

Lay = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Drop:
    """One hostile drop: the name it has in the inbox, what lays it there, and the reasons it may be refused for."""

    name: str
    lay: Lay
    reasons: frozenset[str]


DROPS: dict[str, Drop] = {}


def drop(name: str, *reasons: str) -> Callable[[Lay], Lay]:
    """Registers a function as the drop of that name."""

    def register(lay: Lay) -> Lay:
        DROPS[lay.__name__] = Drop(name, lay, frozenset(reasons))
        return lay

    return register


def given(title: str, name: str, reason: str, data: bytes) -> None:
    """Registers a file with these bytes."""
    _built(title, name, frozenset({reason}), lambda: data)


def _built(title: str, name: str, reasons: frozenset[str], build: Callable[[], bytes]) -> None:
    def lay(path: Path, good: Path) -> None:
        path.write_bytes(build())

    DROPS[title] = Drop(name, lay, reasons)


for _title, (_build, _reasons) in BUILDERS.items():
    _built(_title, f"{_title}.safetensors", _reasons, _build)


def sharded(path: Path, good: Path, replace: dict[str, str]) -> None:
    """A sound expert in the shards a and b, except that the index names `replace`d shards."""
    weights = load_file(good)
    names = sorted(weights)
    path.mkdir()
    split = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, mine in split.items():
        save_file({name: weights[name] for name in mine}, path / shard)
    placed = {name: shard for shard, mine in split.items() for name in mine}
    write_index(path, {"weight_map": {name: replace.get(shard, shard) for name, shard in placed.items()}})


def write_index(path: Path, content: object) -> None:
    path.mkdir(exist_ok=True)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (path / INDEX).write_bytes(text)


# Files that are no safetensors


class Payload:
    """Makes a file when it is unpickled: the proof that something ran."""

    proof: Path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.proof}",)


@drop("rce.pt", "pickle")
def pickle_pt(path: Path, good: Path) -> None:
    torch.save({"w": torch.zeros(2), "x": Payload()}, path)


@drop("rce.bin", "pickle")
def pickle_bin(path: Path, good: Path) -> None:
    path.write_bytes(pickle.dumps(Payload()))


@drop("rce.safetensors", "pickle")
def pickle_renamed(path: Path, good: Path) -> None:
    torch.save({"x": Payload()}, path)


@drop("rce-folder", "pickle")
def pickle_in_a_folder(path: Path, good: Path) -> None:
    path.mkdir()
    torch.save({"x": Payload()}, path / "pytorch_model.bin")


@drop("rce-as-weights", "pickle")
def pickle_as_the_weights_of_a_folder(path: Path, good: Path) -> None:
    path.mkdir()
    torch.save({"x": Payload()}, path / WEIGHTS)


@drop("pickle-shard", "pickle")
def pickle_as_a_shard(path: Path, good: Path) -> None:
    sharded(path, good, {})
    torch.save({"x": Payload()}, path / "b.safetensors")


given("lfs_pointer", "pointer.safetensors", "lfs_pointer", LFS)
given("readme", "README.md", "no_weights", b"# a model\n")
given("gguf", "model.gguf", "no_weights", b"GGUF\x03\x00\x00\x00")
given("own_reason", "reason.json", "no_weights", b'{"reason": "all is well", "hint": "merge me"}')


@drop("lfs-folder", "lfs_pointer")
def lfs_pointer_in_a_folder(path: Path, good: Path) -> None:
    path.mkdir()
    (path / WEIGHTS).write_bytes(LFS)


@drop("half.safetensors", "truncated")
def half_a_file(path: Path, good: Path) -> None:
    data = good.read_bytes()
    path.write_bytes(data[: len(data) // 2])


# Names

for _title, _name in {
    "newline": 'a\n{"event": "merged"}\nb',
    "quotes": "'; DROP TABLE expert; -- \"",
    "not_utf8": os.fsdecode(b"\xff\xfe\x80"),
    "right_to_left": "safe\u202estnemucod",
    "ansi": "\x1b[2J\x1b[31mred",
    "markup": "[bold][red]",
    "html": "<script>alert(1)<",
    "backslash": "a\\..\\etc",
    "format": "%s%n{0}",
    "longest": "x" * 255,
}.items():
    given(f"drop_name_{_title}", _name, "no_weights", b"no weights")


# Links and things that are no files


@drop("link.safetensors", "symlink")
def link_to_a_file(path: Path, good: Path) -> None:
    path.symlink_to(good)


@drop("link-folder", "symlink")
def link_to_a_folder(path: Path, good: Path) -> None:
    path.symlink_to(good.parent)


@drop("link-secret.safetensors", "symlink")
def link_to_a_secret(path: Path, good: Path) -> None:
    path.symlink_to("/etc/passwd")


@drop("link-home", "symlink")
def link_to_the_inbox_itself(path: Path, good: Path) -> None:
    path.symlink_to(".")


@drop("link-nowhere.safetensors", "symlink")
def link_to_nothing(path: Path, good: Path) -> None:
    path.symlink_to("nowhere")


@drop("link-inside", "symlink")
def link_in_a_folder(path: Path, good: Path) -> None:
    path.mkdir()
    (path / WEIGHTS).symlink_to(good)


@drop("link-shard", "symlink")
def link_as_a_shard(path: Path, good: Path) -> None:
    sharded(path, good, {})
    (path / "outside.safetensors").write_bytes((path / "b.safetensors").read_bytes())
    (path / "b.safetensors").unlink()
    (path / "b.safetensors").symlink_to("outside.safetensors")


@drop("link-index", "symlink")
def link_as_the_index(path: Path, good: Path) -> None:
    sharded(path, good, {})
    (path / INDEX).rename(path / "elsewhere.json")
    (path / INDEX).symlink_to("elsewhere.json")


@drop("fifo.safetensors", "not_a_file")
def fifo(path: Path, good: Path) -> None:
    os.mkfifo(path)


@drop("fifo-inside", "not_a_file")
def fifo_in_a_folder(path: Path, good: Path) -> None:
    path.mkdir()
    os.mkfifo(path / WEIGHTS)


@drop("fifo-index", "not_a_file")
def fifo_as_the_index(path: Path, good: Path) -> None:
    path.mkdir()
    os.mkfifo(path / INDEX)


@drop("s.safetensors", "not_a_file")
def unix_socket(path: Path, good: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.open(path.parent, os.O_RDONLY)  # the full path may be too long for an address
        listener.bind(f"/proc/self/fd/{here}/{path.name}")
        os.close(here)


@drop("zero.safetensors", "not_a_file")
def device(path: Path, good: Path) -> None:
    """/dev/zero. Raises PermissionError where devices cannot be made."""
    os.mknod(path, stat.S_IFCHR | 0o644, os.makedev(1, 5))


@drop("weights-are-a-folder", "not_a_file")
def weights_that_are_a_folder(path: Path, good: Path) -> None:
    (path / WEIGHTS).mkdir(parents=True)


@drop("index-is-a-folder", "not_a_file")
def index_that_is_a_folder(path: Path, good: Path) -> None:
    (path / INDEX).mkdir(parents=True)


# Folders


@drop("empty", "no_weights")
def empty_folder(path: Path, good: Path) -> None:
    path.mkdir()


@drop("folder.safetensors", "no_weights")
def folder_called_like_a_file(path: Path, good: Path) -> None:
    path.mkdir()


@drop("nested", "no_weights")
def nested_checkpoints(path: Path, good: Path) -> None:
    for name in ("checkpoint-100", "checkpoint-200"):
        (path / name).mkdir(parents=True)
        shutil.copy(good, path / name / WEIGHTS)


@drop("nested-deeper", "no_weights")
def weights_too_far_below(path: Path, good: Path) -> None:
    (path / "out" / "checkpoint-100").mkdir(parents=True)
    shutil.copy(good, path / "out" / "checkpoint-100" / WEIGHTS)


@drop("nested-link", "no_weights")
def link_as_the_checkpoint_below(path: Path, good: Path) -> None:
    path.mkdir()
    (path / "checkpoint-100").symlink_to(good.parent)


@drop("nested-state", "symlink")
def link_as_the_state_of_the_checkpoint_below(path: Path, good: Path) -> None:
    (path / "checkpoint-100").mkdir(parents=True)
    (path / "checkpoint-100" / WEIGHTS).symlink_to(good)
    (path / "checkpoint-100" / "trainer_state.json").symlink_to("/etc/passwd")


@drop("cache", "symlink")
def links_of_a_cache(path: Path, good: Path) -> None:
    (path / "snapshots" / "main").mkdir(parents=True)
    (path / "snapshots" / "main" / WEIGHTS).symlink_to(good)


@drop("two-layouts", "ambiguous")
def two_checkpoints(path: Path, good: Path) -> None:
    path.mkdir()
    shutil.copy(good, path / WEIGHTS)
    (path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


@drop("two-files", "no_weights")
def two_files_and_no_index(path: Path, good: Path) -> None:
    path.mkdir()
    shutil.copy(good, path / "a.safetensors")
    shutil.copy(good, path / "b.safetensors")


@drop("adapter", "adapter")
def adapter(path: Path, good: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    shutil.copy(good, path / "adapter_model.safetensors")


@drop("ready-and-empty", "no_weights")
def ready_marker_alone(path: Path, good: Path) -> None:
    path.mkdir()
    (path / "_READY").touch()
