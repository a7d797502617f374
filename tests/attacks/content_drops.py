"""Hostile drops, continued: indexes that lie about their shards, and sound files with unsound tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.attacks.builders import framed
from tests.attacks.drops import DROPS, INDEX, Drop, drop, given, sharded, write_index


def _naming(title: str, shard: str, reason: str) -> None:
    """Registers a sound folder whose index names `shard` in place of the second one."""

    def lay(path: Path, good: Path) -> None:
        sharded(path, good, {"b.safetensors": shard})

    DROPS[f"index_{title}"] = Drop(f"index-{title}", lay, frozenset({reason}))


def _indexed(title: str, content: object) -> None:
    """Registers a folder with nothing but this index."""

    def lay(path: Path, good: Path) -> None:
        write_index(path, content)

    DROPS[f"index_{title}"] = Drop(f"index-{title}", lay, frozenset({"bad_index"}))


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
    _naming(_title, _shard, _reason)

_CONTENTS: dict[str, object] = {
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
}
for _title, _content in _CONTENTS.items():
    _indexed(_title, _content)


@drop("index-lies", "bad_index")
def index_that_lies(path: Path, good: Path) -> None:
    sharded(path, good, {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"})


@drop("index-forgets", "bad_index")
def index_that_forgets_a_tensor(path: Path, good: Path) -> None:
    sharded(path, good, {})
    weight_map = json.loads((path / INDEX).read_bytes())["weight_map"]
    weight_map.popitem()
    write_index(path, {"weight_map": weight_map})


@drop("index-doubles", "bad_index", "bad_header")
def tensor_in_two_shards(path: Path, good: Path) -> None:
    sharded(path, good, {})
    twice = load_file(path / "a.safetensors") | load_file(path / "b.safetensors")
    save_file(twice, path / "b.safetensors")
    write_index(path, {"weight_map": dict.fromkeys(twice, "b.safetensors") | {"embed_tokens.weight": "a.safetensors"}})


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
_changed("tensor_missing", "missing_tensor", lambda w: {n: t for n, t in w.items() if n != _UP})
_changed("tensor_too_many", "unexpected_tensor", lambda w: w | {"layers.0.extra.weight": torch.zeros(2)})
_changed("another_architecture", "wrong_base", lambda w: {f"h.{n}.w": t for n, t in enumerate(w.values())})
given(
    "float8",
    "float8.safetensors",
    "unsupported_dtype",
    framed({_UP: {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, bytes(2)),
)
