"""Models of sentence-transformers: only the transformer is merged, and an expert that needs more is refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from daemon.errors import Refused
from daemon.home import Home
from daemon.inspection import inspect
from projector.errors import BadSchema
from registry.records import Expert
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, make_home
from tests.daemon.test_lenient_names import encoder
from tests.daemon.test_names import MEAN, moved
from tests.oracles import mean

Weights = dict[str, Tensor]
DENSE = {"linear.weight": torch.arange(12.0).view(2, 6), "linear.bias": torch.ones(2)}


def saved(folder: Path, weights: Weights, dense: Weights, metadata: dict[str, str] | None = None) -> Path:
    """As SentenceTransformer.save_pretrained lays it out."""
    (folder / "2_Dense").mkdir(parents=True)
    (folder / "modules.json").write_text("[]")
    save_file(weights, folder / "model.safetensors")
    save_file(dense, folder / "2_Dense/model.safetensors", metadata)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home", saved(tmp_path / "base", encoder(), DENSE), MEAN)


def drop(home: Home, folder: Path) -> Expert:
    shutil.copytree(folder, home.inbox / folder.name)
    drain(home)
    return experts(home)[-1]


def test_one_whose_dense_layer_is_the_bases_is_merged(home: Home, tmp_path: Path) -> None:
    tuned = moved(encoder(), 1)
    assert drop(home, saved(tmp_path / "x", tuned, DENSE, {"format": "pt"})).detail is None
    assert_close(latest(home), mean(encoder(), [tuned]))


@pytest.mark.parametrize("pickled", [False, True])
def test_one_whose_dense_layer_was_trained_is_refused_and_its_hint_works(
    home: Home, tmp_path: Path, pickled: bool
) -> None:
    tuned = moved(encoder(), 1)
    folder = saved(tmp_path / "x", tuned, moved(DENSE, 1))
    if pickled:
        (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with lineage(home) as reader, pytest.raises(BadSchema, match="2_Dense are not the base's"):
        inspect(home, reader, folder, None)
    refused = drop(home, folder)
    assert refused.reason == "unexpected_tensor" and "without 2_Dense" in (refused.hint or "")
    shutil.rmtree(folder / "2_Dense")
    assert drop(home, folder).detail is None
    assert_close(latest(home), mean(encoder(), [tuned]))


def test_where_the_transformer_lies_below_the_refusal_says_where(home: Home, tmp_path: Path) -> None:
    tuned = moved(encoder(), 1)
    folder = saved(tmp_path / "x", tuned, DENSE)
    (folder / "0_Transformer").mkdir()
    (folder / "model.safetensors").rename(folder / "0_Transformer/model.safetensors")
    refused = drop(home, folder)
    assert (refused.reason, refused.hint) == ("no_weights", "take the folder 0_Transformer itself")
    with pytest.raises(Refused, match="0_Transformer; 2_Dense would not be merged"):
        make_home(tmp_path / "other", folder, MEAN)
    assert drop(home, folder / "0_Transformer").detail is None
    assert make_home(tmp_path / "again", folder / "0_Transformer", MEAN).exists()
