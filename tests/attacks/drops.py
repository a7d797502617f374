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
from torch import Tensor

from tests.attacks.builders import BUILDERS, framed
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


def _bytes(title: str, name: str, reason: str, data: bytes) -> None:
    DROPS[title] = Drop(name, lambda path, good: _write(path, data), frozenset({reason}))


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


for _title, (_build, _reasons) in BUILDERS.items():
    DROPS[_title] = Drop(f"{_title}.safetensors", lambda path, good, build=_build: _write(path, build()), _reasons)


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
    _sharded(path, good, {})
    torch.save({"x": Payload()}, path / "b.safetensors")


_bytes("lfs_pointer", "pointer.safetensors", "lfs_pointer", LFS)
_bytes("readme", "README.md", "no_weights", b"# a model\n")
_bytes("gguf", "model.gguf", "no_weights", b"GGUF\x03\x00\x00\x00")
_bytes("own_reason", "reason.json", "no_weights", b'{"reason": "all is well", "hint": "merge me"}')


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
    _bytes(f"drop_name_{_title}", _name, "no_weights", b"no weights")


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
    _sharded(path, good, {})
    (path / "outside.safetensors").write_bytes((path / "b.safetensors").read_bytes())
    (path / "b.safetensors").unlink()
    (path / "b.safetensors").symlink_to("outside.safetensors")


@drop("link-index", "symlink")
def link_as_the_index(path: Path, good: Path) -> None:
    _sharded(path, good, {})
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
def nested_folder(path: Path, good: Path) -> None:
    (path / "checkpoint-100").mkdir(parents=True)
    shutil.copy(good, path / "checkpoint-100" / WEIGHTS)


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


def _sharded(path: Path, good: Path, replace: dict[str, str]) -> None:
    """A sound expert in the shards a and b, except that the index names `replace`d shards."""
    weights = load_file(good)
    names = sorted(weights)
    path.mkdir()
    split = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, mine in split.items():
        save_file({name: weights[name] for name in mine}, path / shard)
    placed = {name: shard for shard, mine in split.items() for name in mine}
    _index(path, {"weight_map": {name: replace.get(shard, shard) for name, shard in placed.items()}})


def _index(path: Path, content: object) -> None:
    path.mkdir(exist_ok=True)
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (path / INDEX).write_bytes(text)


for _title, _shard, _reason in (
    ("traversal", "../secret.safetensors", "bad_index"),
    ("absolute", "/etc/secret.safetensors", "bad_index"),
    ("dots", "..", "bad_index"),
    ("newline", "b.safetensors\n", "bad_index"),
    ("nul", "b\0.safetensors", "bad_index"),
    ("surrogate", "\ud800.safetensors", "bad_index"),
    ("pickle", "b.bin", "bad_index"),
    ("itself", INDEX, "bad_index"),
    ("missing", "c.safetensors", "incomplete"),
    ("megabyte", "c" * (1 << 20) + ".safetensors", "incomplete"),
):
    DROPS[f"index_{_title}"] = Drop(
        f"index-{_title}",
        lambda path, good, shard=_shard: _sharded(path, good, {"b.safetensors": shard}),
        frozenset({_reason}),
    )

for _title, _content in {
    "not_json": b"{weight_map",
    "not_utf8": b"\xff\xfe\xfd",
    "deep": b"[" * 200_000,
    "a_list": [],
    "null": None,
    "no_map": {"metadata": {}},
    "empty_map": {"weight_map": {}},
    "map_of_numbers": {"weight_map": {"w": 1}},
    "map_is_a_list": {"weight_map": ["a.safetensors"]},
    "of_17_megabytes": b" " * (17 << 20),
    "number_of_digits": b'{"weight_map":{"w":' + b"9" * 10_000 + b"}}",
}.items():
    DROPS[f"index_{_title}"] = Drop(
        f"index-{_title}", lambda path, good, content=_content: _index(path, content), frozenset({"bad_index"})
    )


@drop("index-lies", "bad_index")
def index_that_lies(path: Path, good: Path) -> None:
    _sharded(path, good, {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"})


@drop("index-forgets", "bad_index")
def index_that_forgets_a_tensor(path: Path, good: Path) -> None:
    _sharded(path, good, {})
    weight_map = json.loads((path / INDEX).read_bytes())["weight_map"]
    weight_map.popitem()
    _index(path, {"weight_map": weight_map})


@drop("index-doubles", "bad_index", "bad_header")
def tensor_in_two_shards(path: Path, good: Path) -> None:
    _sharded(path, good, {})
    twice = load_file(path / "a.safetensors") | load_file(path / "b.safetensors")
    save_file(twice, path / "b.safetensors")
    _index(path, {"weight_map": dict.fromkeys(twice, "b.safetensors") | {"embed_tokens.weight": "a.safetensors"}})


# Sound files, unsound tensors


def _changed(title: str, reason: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    def lay(path: Path, good: Path) -> None:
        save_file(change(load_file(good)), path)

    DROPS[title] = Drop(f"{title}.safetensors", lay, frozenset({reason}))


def _last_value(value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        wide = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
        name = max(name for name in wide if wide[name].is_floating_point())  # the writer sorts names: the last data
        wide[name].view(-1)[-1] = value
        return wide

    return change


_UP = "layers.0.up.weight"
_changed("nan_in_the_last_value", "not_finite", _last_value(float("nan")))
_changed("infinity_in_the_last_value", "not_finite", _last_value(float("inf")))
_changed("overflow_on_subtraction", "not_finite", _last_value(1e300, torch.float64))
_changed(
    "nan_everywhere",
    "not_finite",
    lambda w: {n: t * float("nan") if t.is_floating_point() else t for n, t in w.items()},
)
_changed(
    "norm_of_a_million", "foreign_base", lambda w: {n: t * 1e6 if t.is_floating_point() else t for n, t in w.items()}
)
_changed("all_zero_weights", "foreign_base", lambda w: {n: torch.zeros_like(t) for n, t in w.items()})
_changed("one_huge_value", "foreign_base", _last_value(3e38))
_changed("wrong_shape", "wrong_shape", lambda w: w | {_UP: torch.zeros(3, 3)})
_changed("transposed", "wrong_shape", lambda w: w | {_UP: w[_UP].T.contiguous()})
_changed("flattened", "wrong_shape", lambda w: w | {_UP: w[_UP].flatten()})
_changed("resized_vocabulary", "wrong_shape", lambda w: w | {"embed_tokens.weight": torch.zeros(25, 16)})
_changed("quantised", "unsupported_dtype", lambda w: w | {_UP: w[_UP].to(torch.int8)})
_changed("floating_buffer", "unsupported_dtype", lambda w: w | {"position_ids": w["position_ids"].float()})
_changed("tensor_missing", "missing_tensor", lambda w: {n: t for n, t in w.items() if n != _UP})
_changed("tensor_too_many", "unexpected_tensor", lambda w: w | {"lm_head.weight": torch.zeros(2)})
_changed("another_architecture", "wrong_base", lambda w: {f"model.{n}": t for n, t in w.items()})
_bytes(
    "float8",
    "float8.safetensors",
    "unsupported_dtype",
    framed({_UP: {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, bytes(2)),
)
