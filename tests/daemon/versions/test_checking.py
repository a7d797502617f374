"""What a version consists of: companions, the plan of its weights, its manifest, and what is found wrong with it."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from daemon.layout import Home
from daemon.versions.checking import entry, problems
from daemon.versions.weight_files import METADATA, plan_weights
from projector.files.header import build_header
from projector.spec import TensorSpec
from registry.records import Version
from tests.daemon.homes import drain, latest, lineage, put, quick
from tests.models import write_expert


@pytest.fixture
def merged(home: Home, base: Path, tmp_path: Path) -> Home:
    """A home whose main is at version 1."""
    put(home, write_expert(tmp_path / "e.safetensors", base, 2))
    drain(home)
    return home


def version_of(home: Home, number: int) -> Version:
    with lineage(home) as reader:
        found = reader.version("main", number)
    assert found is not None
    return found


def test_a_small_model_is_one_file_without_an_index() -> None:
    specs = [TensorSpec(name, (4, 4), torch.float32) for name in "ab"]
    (file,), index = plan_weights(specs, 1000)
    assert (file.name, list(file.specs), index) == ("model.safetensors", specs, None)


def test_a_large_one_is_split_and_indexed() -> None:
    specs = [TensorSpec(name, (4, 4), torch.float32) for name in "abc"]
    files, index = plan_weights(specs, 100)
    assert index is not None
    read = json.loads(index.text)
    assert index.name == "model.safetensors.index.json"
    assert read["metadata"]["total_size"] == 3 * 64
    assert read["weight_map"] == {spec.name: file.name for file in files for spec in file.specs}
    assert sorted(file.name for file in files) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


@pytest.mark.parametrize("limit", [1000, 1023, 1500, 4000])
def test_no_file_of_several_tensors_is_larger_than_allowed(limit: int) -> None:
    """Many small tensors, of which the headers are longer than the data, and one that is too large for any limit."""
    shapes = [(), (0, 3), (1,), (7, 3), (16,)] * 12
    specs = [TensorSpec(f"schicht.{n}.größe", shape, torch.float16) for n, shape in enumerate(shapes)]
    specs.insert(20, TensorSpec("large", (200, 100), torch.float64))
    files, index = plan_weights(specs, limit)
    assert index is not None and json.loads(index.text)["metadata"]["total_size"] == sum(spec.nbytes for spec in specs)
    assert [spec for file in files for spec in file.specs if spec.name != "large"] == specs[:20] + specs[21:]
    sizes = {file.name: build_header(file.specs, METADATA)[1].size for file in files if len(file.specs) > 1}
    assert max(sizes.values()) <= limit
    assert len(files) - 1 <= 1.5 * (sum(sizes.values()) / limit + 1)  # and they are not far from full
    assert [spec.name for file in files if len(file.specs) == 1 for spec in file.specs] == ["large"]


def test_the_manifest_names_everything_a_version_came_from(merged: Home) -> None:
    manifest = json.loads(merged.manifest("main", 1).read_bytes())
    with lineage(merged) as reader:
        base, (expert,) = reader.base(), reader.lineage()
    assert manifest["base_sha256"] == base.sha256
    assert manifest["expert"] == {"sha256": expert.sha256, "name": "e.safetensors", "task": None, "weight": 1.0}
    assert manifest["parent"] == {"version": 0, "manifest_sha256": version_of(merged, 0).manifest_sha256}
    assert (manifest["method"], manifest["experts"]) == ("opcm", 1)
    assert manifest["params"]["alpha"] == 0.5
    for file in manifest["files"]:
        path = merged.version("main", 1) / file["name"]
        assert file == {"name": path.name, "size": path.stat().st_size, "sha256": entry(path).sha256}
    assert {file["name"] for file in manifest["files"]} | {"manifest.json"} == set(
        os.listdir(merged.version("main", 1))
    )
    state = merged.head_state("main", 1) / "state.safetensors"
    assert manifest["state"]["sha256"] == entry(state).sha256


def test_published_files_can_be_read_by_everybody(merged: Home) -> None:
    for path in merged.published.rglob("*"):
        if not path.is_symlink():
            assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "found", "by_size"),
    [
        (lambda home: _flip(home.version("main", 1) / "model.safetensors"), "model.safetensors: its sha256", False),
        (lambda home: _flip(home.head_state("main", 1) / "state.safetensors"), "state.safetensors: its sha256", False),
        (lambda home: _flip(home.manifest("main", 1)), "manifest.json: its sha256 is not the registry's", True),
        (lambda home: home.manifest("main", 1).unlink(), "manifest.json: No such file", True),
        (lambda home: (home.version("main", 1) / "model.safetensors").unlink(), "model.safetensors: No such", True),
        (lambda home: os.truncate(home.version("main", 1) / "model.safetensors", 9), "9 bytes, the manifest", True),
        (lambda home: (home.version("main", 1) / "extra").touch(), "extra: not in the manifest", True),
    ],
)
def test_damage_is_named(merged: Home, damage: Callable[[Home], object], found: str, by_size: bool) -> None:
    version = version_of(merged, 1)
    assert problems(merged, version, hashes=True) == []
    damage(merged)
    (problem,) = problems(merged, version, hashes=True)
    assert found in problem and problem.startswith(("published/main/000001/", "state/heads/main/000001/"))
    assert bool(problems(merged, version, hashes=False)) is by_size


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_published_dtype_is_a_setting_and_is_told(home: Home, base: Path, tmp_path: Path, dtype: str) -> None:
    put(home, write_expert(tmp_path / "e.safetensors", base, 2))
    drain(home, quick(publish={"dtype": dtype}))
    found = {tensor.dtype for tensor in latest(home).values() if tensor.is_floating_point()}
    assert found == {getattr(torch, dtype)}
    assert json.loads(home.manifest("main", 1).read_bytes())["dtype"] == dtype
