"""`mainstem convert` on folders: shards and their index, and bad ones."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from daemon.checkpoints.checkpoint import open_path
from daemon.convert.confining import Options
from daemon.convert.converting import convert
from daemon.errors import NotYet, Refused
from tests.daemon.convert.bits import equal
from tests.models import read_weights

INDEX = "pytorch_model.bin.index.json"


def write_shards(folder: Path, weights: dict[str, Tensor], prefix: str = "") -> dict[str, str]:
    """Two shards and their index, as save_pretrained wrote them before safetensors; the weight_map."""
    folder.mkdir()
    names = sorted(weights)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, mine in shards.items():
        torch.save({prefix + name: weights[name] for name in mine}, folder / shard)
    weight_map = {prefix + name: shard for shard, mine in shards.items() for name in mine}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return weight_map


@pytest.mark.usefixtures("no_process")
def test_shards_stay_shards_and_get_their_index(base: Path, tmp_path: Path) -> None:
    weights = read_weights(base)
    write_shards(tmp_path / "in", weights, prefix="module.")
    (tmp_path / "in/config.json").write_text("{}")
    (tmp_path / "in/expert.json").write_text('{"name": "french"}')
    report = convert(tmp_path / "in", tmp_path / "out", Options(strip_prefix="module."))
    assert report.stripped == len(weights) and report.copied == ["config.json", "expert.json"]
    with open_path(tmp_path / "out") as opened:
        assert (opened.kind, opened.identity()) == ("sharded", report.sha256)
        assert opened.about is not None and opened.about.name == "french"
        assert equal({name: opened.tensors.read(name) for name in opened.tensors.schema}, weights)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.itemsize for tensor in weights.values())
    assert index["weight_map"][min(weights)] == "model-00001-of-00002.safetensors"


def lose_a_shard(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00002.bin").unlink()


def promise_more(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["never.saved"] = "pytorch_model-00001-of-00002.bin"
    (folder / INDEX).write_text(json.dumps(index))


def save_a_name_twice(folder: Path) -> None:
    torch.save(torch.load(folder / "pytorch_model-00001-of-00002.bin"), folder / "pytorch_model-00002-of-00002.bin")


def lead_out(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"w": "../pytorch_model.bin"}}))


def name_one_as_if_it_were_all(folder: Path) -> None:
    index = (folder / INDEX).read_text().replace("pytorch_model-00001-of-00002.bin", "pytorch_model.bin")
    (folder / INDEX).write_text(index)
    (folder / "pytorch_model-00001-of-00002.bin").rename(folder / "pytorch_model.bin")


def lay_a_fifo_beside(folder: Path) -> None:
    os.mkfifo(folder / "expert.json")


def spoil_the_index(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def cut_the_index(folder: Path) -> None:
    os.truncate(folder / INDEX, 40)


def spoil_a_shard(folder: Path) -> None:
    (folder / "pytorch_model-00002-of-00002.bin").write_bytes(b"PK\x03\x04 and no more")


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("spoil", "error", "reason", "said"),
    [
        (lose_a_shard, NotYet, "incomplete", "pytorch_model-00002-of-00002.bin"),
        (promise_more, Refused, "bad_index", "never.saved"),
        (save_a_name_twice, Refused, "bad_index", "two shards hold"),
        (name_one_as_if_it_were_all, Refused, "bad_index", "of one name"),
        (lay_a_fifo_beside, Refused, "not_a_file", "expert.json"),
        (lead_out, Refused, "bad_index", "pytorch_model.bin.index.json: ../pytorch_model.bin cannot be the name"),
        (spoil_the_index, Refused, "bad_index", "weight_map"),
        (cut_the_index, NotYet, "bad_index", "pytorch_model.bin.index.json is not JSON"),
        (spoil_a_shard, Refused, "truncated", "pytorch_model-00002-of-00002.bin: it is damaged"),
    ],
)
def test_bad_shards_are_refused_and_leave_nothing(
    base: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    error: type[Exception],
    reason: str,
    said: str,
) -> None:
    write_shards(tmp_path / "in", read_weights(base))
    spoil(tmp_path / "in")
    with pytest.raises(error) as caught:
        convert(tmp_path / "in", tmp_path / "out")
    assert (caught.value.reason, said in str(caught.value)) == (reason, True), caught.value  # type: ignore[attr-defined]
    assert os.listdir(tmp_path) == ["in"]
