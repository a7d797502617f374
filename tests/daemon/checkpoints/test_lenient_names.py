"""Experts as trainers save them: names that fit in one way alone, heads of their own, and what expert.json says."""

import json
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from torch import Tensor

from daemon.config import load
from daemon.layout import Home
from daemon.reports.compare import compare, find_version
from daemon.reports.inspect import inspect
from registry.records import Expert, Status
from tests.daemon.checkpoints.test_names import MEAN, moved
from tests.daemon.homes import Heads, assert_close, drain, experts, latest, lineage, make_home, quick
from tests.daemon.processes import forked
from tests.models import read_weights
from tests.oracles.rules import mean

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported

Weights = dict[str, Tensor]
Renames = Callable[[str], str]


def encoder() -> Weights:
    """The file of a small encoder, with a pooler."""
    draw = torch.Generator().manual_seed(0)
    shapes = {f"encoder.layer.{n}.{part}.weight": (6, 6) for n in range(3) for part in ("query", "key")}
    shapes |= {"embeddings.word.weight": (20, 6), "embeddings.token_type.weight": (2, 6), "pooler.dense.weight": (6, 6)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    save_file(encoder(), tmp_path / "base.safetensors")
    return make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)


def folder(path: Path, weights: Weights, about: Mapping[str, Any] | None = None) -> Path:
    path.mkdir()
    save_file(weights, path / "model.safetensors")
    if about is not None:
        (path / "expert.json").write_text(json.dumps(about))
    return path


def drop(home: Home, weights: Weights, name: str, about: Mapping[str, Any] | None = None) -> Expert:
    folder(home.inbox / name, weights, about)
    drain(home, quick(admission=load(home.config).admission.model_dump()))
    return experts(home)[-1]


def classifier(weights: Weights) -> Weights:
    """As BertForTokenClassification saves it: with a prefix, a head, and no pooler."""
    named = {f"bert.{name}": tensor for name, tensor in weights.items() if "pooler" not in name}
    return named | {"classifier.weight": torch.ones(2, 6), "classifier.bias": torch.zeros(2)}


def test_a_classifier_over_an_encoder_is_merged_as_it_is_and_found_again(home: Home, tmp_path: Path) -> None:
    base, tuned = encoder(), moved(encoder(), 1)
    path = folder(tmp_path / "dry", classifier(tuned))
    with lineage(home) as reader:
        dry = inspect(home, reader, path, None)
    assert set(dry["ignored"]) == {"classifier.weight", "classifier.bias"}
    assert dry["unchanged"] == ["pooler.dense.weight"]
    assert dry["renamed"]["bert.embeddings.word.weight"] == "embeddings.word.weight"

    with capture_logs() as lines:
        merged = drop(home, classifier(tuned), "first")
    wanted = tuned | {"pooler.dense.weight": base["pooler.dense.weight"]}
    assert merged.detail is None and merged.naming == {
        "prefixes": {"bert.": ""},
        "ignore": ["classifier.*"],
        "unchanged": ["pooler.*"],
    }
    assert_close(latest(home), mean(base, [wanted]))
    (said,) = (line for line in lines if "made to fit" in line["event"])
    assert said["log_level"] == "warning"
    assert (said["prefixes"], said["ignore"], said["unchanged"]) == ({"bert.": ""}, ["classifier.*"], ["pooler.*"])

    assert drop(home, {f"module.{name}": tensor for name, tensor in wanted.items()}, "again").duplicate_of == merged.id
    other = drop(home, moved(base, 2), "second")
    home.config.write_text("[admission]\nlenient_names = false\n")
    strict = drop(home, classifier(moved(base, 3)), "strict")
    assert strict.reason == "wrong_base" and "admission.lenient_names be true" in (strict.hint or "")
    with lineage(home) as reader:
        a, b = find_version(reader, "1"), find_version(reader, "2")
        assert compare(home, reader, a, b, experts=True)["experts"][0]["a_kept"] == pytest.approx(1, abs=1e-4)
    before = latest(home)
    (home.archived(merged.id) / "expert.json").write_text('{"ignore": ["*"], "prefixes": {"": "x."}}')  # type: ignore[operator]
    assert forked("rebuild", "--home", home.root, "--into", tmp_path / "new", "--method", "mean").returncode == 0
    again = latest(Home(tmp_path / "new"))
    assert all(torch.equal(again[name], before[name]) for name in before)
    assert experts(Home(tmp_path / "new"))[0].naming == merged.naming
    assert forked("rebuild", "--home", home.root, "--without", other.name).returncode == 0
    assert_close(latest(home), mean(base, [wanted]))


def test_expert_json_says_what_its_names_are(home: Home) -> None:
    base, tuned = encoder(), moved(encoder(), 1)
    home.config.write_text("[admission]\nlenient_names = false\n")
    theirs = {name.replace("encoder.layer", "blocks"): tensor for name, tensor in tuned.items() if "pooler" not in name}
    theirs["blocks.0.adapter.weight"] = torch.ones(3, 3)
    assert drop(home, theirs, "silent").reason == "missing_tensor"
    about = {"prefixes": {"blocks.*.": "encoder.layer.*."}, "ignore": ["*.adapter.*"], "unchanged": ["pooler.*"]}
    merged = drop(home, theirs, "telling", about)
    assert merged.detail is None and merged.naming == about and merged.about == about
    assert_close(latest(home), mean(base, [tuned | {"pooler.dense.weight": base["pooler.dense.weight"]}]))


@pytest.mark.parametrize(
    ("extra", "missing", "about"),
    [
        ({"ema.": lambda name: True}, (), {"ignore": ["ema.*"]}),
        ({"": lambda name: False}, ("embeddings.word.weight",), {"unchanged": ["embeddings.word.*"]}),
    ],
)
def test_the_hints_of_refusals_work(
    home: Home, extra: Mapping[str, Callable[[str], bool]], missing: tuple[str, ...], about: Mapping[str, Any]
) -> None:
    tuned = moved(encoder(), 1)
    theirs = {name: tensor for name, tensor in tuned.items() if name not in missing}
    for prefix, wanted in extra.items():
        theirs |= {prefix + name: tensor + 1 for name, tensor in tuned.items() if wanted(name)}
    refused = drop(home, theirs, "refused")
    assert refused.status is Status.QUARANTINED and refused.hint
    hinted = json.loads(refused.hint[refused.hint.index("{") : refused.hint.index("}") + 1])
    assert hinted == about
    assert drop(home, theirs, "mended", hinted).status is Status.MERGED
    kept = {name: encoder()[name] for name in missing}
    assert_close(latest(home), mean(encoder(), [tuned | kept]))


def test_a_home_that_needs_a_fisher_takes_none_of_what_the_expert_lacks(home: Home, tmp_path: Path) -> None:
    heads: Heads = (("main", "fisher", {}),)
    other = make_home(tmp_path / "other", tmp_path / "base.safetensors", heads)
    theirs = classifier(moved(encoder(), 1))
    folder(other.inbox / "x", theirs)
    save_file({name: torch.rand_like(tensor) for name, tensor in theirs.items()}, other.inbox / "x/fisher.safetensors")
    drain(other)
    assert experts(other)[-1].detail is None
    assert torch.equal(latest(other)["pooler.dense.weight"], encoder()["pooler.dense.weight"])


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the library's own
def test_models_of_the_library_for_other_tasks_than_the_bases(tmp_path: Path) -> None:
    """Of each task with its own head, some with a pooler and some without, over the encoder and over a masked LM."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12
    )
    tasks = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
    for base_task in ("Model", "ForMaskedLM"):
        root = tmp_path / base_task
        torch.manual_seed(0)
        getattr(transformers, f"Bert{base_task}")(config).save_pretrained(root / "base")
        home = make_home(root / "home", root / "base", MEAN)
        base, arrived = read_weights(root / "base"), {}
        for seed, task in enumerate(tasks, start=1):
            model = getattr(transformers, f"Bert{task}").from_pretrained(root / "base")
            model.save_pretrained(home.inbox / task)
            file = home.inbox / task / "model.safetensors"
            tuned = moved(load_file(file), seed)
            save_file(tuned, file)
            plain = {name.removeprefix("bert."): tensor for name, tensor in tuned.items()}
            arrived[task] = {name: plain.get(name.removeprefix("bert."), tensor) for name, tensor in base.items()}
        drain(home, quick(admission={"max_base_ratio": 1e9}))
        assert {one.name: one.detail for one in experts(home)} == dict.fromkeys(tasks)
        assert_close(latest(home), mean(base, [arrived[one.name] for one in experts(home)]))
