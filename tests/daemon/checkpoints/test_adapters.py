"""Dropped LoRA adapters: opened, refused by name, merged by a running daemon, compared, taken out and merged again."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.checkpoints.adapter_config import ADAPTER, ADAPTER_WEIGHTS, MAX_CONFIG_BYTES, NO_MATTER, USED, VARIANTS
from daemon.checkpoints.checkpoint import open_path
from daemon.errors import BadHome, NotYet, Reason, Refused
from daemon.home.verification import verify
from daemon.layout import Home
from registry.records import Status
from tests.adapters import configure, llama, merged, train, write
from tests.adapters import trained as trained_model
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, live, make_home, put, reason_of
from tests.daemon.processes import forked, running
from tests.oracles.rules import mean, opcm

pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

HEADS = [("main", "opcm", {}), ("soup", "mean", {})]
SETTINGS: dict[str, Any] = {"r": 3, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(llama, tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of one base, each of another kind."""
    root = tmp_path_factory.mktemp("trained")
    return [
        train(llama, root / "plain", steps=1, **SETTINGS),
        train(llama, root / "dora", steps=2, r=2, target_modules=["v_proj", "up_proj"], use_dora=True),
        train(
            llama,
            root / "words",
            steps=3,
            r=2,
            lora_alpha=1,
            target_modules=["embed_tokens", "q_proj"],
            use_rslora=True,
        ),
    ]


@pytest.fixture
def adapter(trained: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "adapter"))


@pytest.fixture(scope="module")
def empty_root(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return make_home(tmp_path_factory.mktemp("homes") / "home", base, HEADS).root


@pytest.fixture
def home(empty_root: Path, tmp_path: Path) -> Home:
    """A new home with the heads main (opcm) and soup (mean) over the adapters' base."""
    return Home(shutil.copytree(empty_root, tmp_path / "home", symlinks=True))


def drop(home: Home, adapter: Path, name: str | None = None) -> None:
    """Drops a copy and merges it."""
    shutil.copytree(adapter, home.inbox / (name or adapter.name))
    drain(home)


def tuned(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The whole model that peft makes of an adapter, in float64."""
    added = merged(llama, adapter)
    return {name: tensor.double() + added[name] for name, tensor in load_file(base).items()}


def test_a_running_daemon_merges_what_trainers_drop(home: Home, base: Path, trained: list[Path]) -> None:
    with running("run", "--home", home.root, "--port", "0") as daemon:
        for n, path in enumerate(trained, start=1):
            shutil.copytree(path, home.tmp / path.name)
            put(home, home.tmp / path.name)
            daemon.wait_for(n)
        assert daemon.stop() == 0
    origin, models = load_file(base), [tuned(base, path) for path in trained]
    assert_close(latest(home), opcm(origin, models))
    assert_close(latest(home, "soup"), mean(origin, models))
    assert [(e.kind, e.status) for e in experts(home)] == [("adapter", Status.MERGED)] * 3
    for expert, path in zip(experts(home), trained, strict=True):
        assert expert.norm == pytest.approx(
            sum(float(delta.square().sum()) for delta in merged(llama, path).values()) ** 0.5, rel=1e-6
        )
        assert {file.name for file in (home.archive(expert.id) / path.name).iterdir()} >= {ADAPTER, ADAPTER_WEIGHTS}
    assert not (home.latest("main") / ADAPTER).exists()
    with lineage(home) as reader:
        _, problems = verify(home, reader, lambda what: None)
    assert problems == []


def test_an_adapter_and_the_whole_model_are_one_expert_to_the_merge(home: Home, base: Path, adapter: Path) -> None:
    """The same task vector, whichever way it arrives."""
    twin = Home(shutil.copytree(home.root, home.root.parent / "twin", symlinks=True))
    drop(home, adapter)
    save_file({name: tensor.float() for name, tensor in tuned(base, adapter).items()}, twin.inbox / "x.safetensors")
    drain(twin)
    assert_close(latest(home), latest(twin))


def test_inspect_compare_and_duplicates(home: Home, adapter: Path, tmp_path: Path) -> None:
    at = ("--json", "--home", home.root)
    found = json.loads(forked("inspect", adapter, *at).stdout)
    assert found["accepted"] and found["kind"] == "adapter" and found["duplicate_of"] is None
    drop(home, adapter)
    (one,) = experts(home)
    assert one.sha256 == found["sha256"] and one.norm == pytest.approx(found["norm"], rel=1e-12)
    assert json.loads(forked("inspect", adapter, *at).stdout)["duplicate_of"] == one.id
    drop(home, adapter, "again")
    assert experts(home)[1].status is Status.DUPLICATE and live(home) == 1
    done = forked("compare", "main", "soup", "--experts", *at)
    (kept,) = json.loads(done.stdout)["experts"]
    assert kept["a_kept"] == pytest.approx(1, abs=1e-5) and kept["a_cosine"] == pytest.approx(1, abs=1e-5)


def test_rebuild_without_one_and_into_a_new_home(home: Home, base: Path, trained: list[Path], tmp_path: Path) -> None:
    for path in trained:
        drop(home, path)
    target = Home(tmp_path / "new")
    done = forked("rebuild", "--home", home.root, "--into", target.root)
    assert done.returncode == 0, done.stderr
    for head in ("main", "soup"):
        ours, theirs = latest(target, head), latest(home, head)
        assert all(ours[name].equal(theirs[name]) for name in theirs)
    done = forked("rebuild", "--home", home.root, "--without", "dora")
    assert done.returncode == 0, done.stderr
    origin, left = load_file(base), [tuned(base, trained[0]), tuned(base, trained[2])]
    assert_close(latest(home, "soup"), mean(origin, left))
    assert_close(latest(home), opcm(origin, left))


def test_the_weight_beside_an_adapter_counts(home: Home, base: Path, trained: list[Path], tmp_path: Path) -> None:
    heavy = shutil.copytree(trained[1], tmp_path / "heavy")
    (heavy / "expert.json").write_text('{"weight": 3}')
    drop(home, trained[0])
    drop(home, heavy)
    origin, (a, b) = load_file(base), (tuned(base, path) for path in trained[:2])
    wanted = {name: origin[name] + (a[name] - origin[name] + 3 * (b[name] - origin[name])) / 4 for name in origin}
    assert_close(latest(home, "soup"), wanted)


def test_a_sidecar_lies_beside_an_adapter_as_beside_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "fisher", base, [("main", "fisher", {})])
    drop(home, adapter, "bare")
    assert experts(home)[0].reason == "missing_sidecar"
    ones = {name: torch.ones_like(tensor) for name, tensor in load_file(base).items()}
    save_file(ones, adapter / "fisher.safetensors")
    drop(home, adapter)
    assert experts(home)[1].status is Status.MERGED and set(experts(home)[1].sidecars or ()) == {"fisher"}
    assert_close(latest(home), tuned(base, adapter))


def test_both_files_are_its_identity(adapter: Path) -> None:
    listing = "".join(
        f"{hashlib.sha256((adapter / name).read_bytes()).hexdigest()}  {name}\n" for name in (ADAPTER, ADAPTER_WEIGHTS)
    )
    with open_path(adapter) as opened:
        assert opened.identity() == hashlib.sha256(listing.encode()).hexdigest()
        assert opened.kind == "adapter" and opened.unchanged()
        os.utime(adapter / ADAPTER, ns=(1, 1))
        assert not opened.unchanged()
    configure(adapter, lora_alpha=9)
    with open_path(adapter) as opened:
        assert opened.identity() != hashlib.sha256(listing.encode()).hexdigest()


def test_an_adapter_is_no_base(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BadHome, match="an adapter, not a model"):
        make_home(tmp_path / "none", adapter)


@pytest.mark.parametrize("missing", [ADAPTER, ADAPTER_WEIGHTS])
def test_half_an_adapter_may_only_be_unfinished(adapter: Path, missing: str) -> None:
    (adapter / missing).unlink()
    with pytest.raises(NotYet, match=missing) as caught, open_path(adapter):
        pass
    assert caught.value.reason is Reason.INCOMPLETE


def test_a_pickled_adapter_is_to_be_converted(adapter: Path) -> None:
    (adapter / ADAPTER_WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(NotYet, match="pickled") as caught, open_path(adapter):
        pass
    assert caught.value.reason is Reason.PICKLE


@pytest.mark.parametrize("whole", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_beside_a_whole_model_is_refused(adapter: Path, base: Path, whole: str, config: bool) -> None:
    shutil.copy(base, adapter / whole)
    if not config:
        (adapter / ADAPTER).unlink()
    with pytest.raises(Refused, match=f"an adapter and a whole model, {whole}") as caught, open_path(adapter):
        pass
    assert caught.value.reason is Reason.ADAPTER


def test_only_one_adapter_is_taken_at_a_time(adapter: Path, home: Home) -> None:
    """PEFT saves further adapters into folders of their own; a trainer its checkpoints."""
    shutil.copytree(adapter, adapter / "checkpoint-500")
    shutil.copytree(adapter, adapter / "second", ignore=lambda *_: ["checkpoint-500"])
    with pytest.raises(Refused, match="more adapters, in second") as caught, open_path(adapter):
        pass
    assert caught.value.reason is Reason.ADAPTER
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        (adapter / name).unlink()
    with pytest.raises(NotYet, match="its adapters are in checkpoint-500, second") as unfinished, open_path(adapter):
        pass
    assert unfinished.value.reason is Reason.NO_WEIGHTS
    drop(home, adapter / "second")
    assert experts(home)[0].status is Status.MERGED


@pytest.mark.parametrize("file", [True, False])
def test_an_adapters_tensors_alone_are_refused_as_such(adapter: Path, home: Home, file: bool) -> None:
    (adapter / ADAPTER).unlink()
    weights = (adapter / ADAPTER_WEIGHTS).rename(adapter / "expert.safetensors")
    put(home, weights if file else adapter)
    drain(home)
    (expert,) = experts(home)
    assert expert.reason == "adapter" and "the factors of a LoRA adapter" in (expert.detail or "")
    assert ADAPTER in (expert.hint or "")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "peft_type": ({"peft_type": "LOHA"}, "peft_type is LOHA"),
    "ia3": ({"peft_type": "IA3"}, "peft_type is IA3"),
    "adalora": ({"peft_type": "ADALORA"}, "peft_type is ADALORA"),
    "prompts": ({"peft_type": "PREFIX_TUNING"}, "PREFIX_TUNING, which changes no weights"),
    "no peft_type": ({"peft_type": None}, "no peft_type"),
    "kasa": ({"kasa_config": {"beta": 1e-4}}, "KaSA"),
    "qalora": ({"use_qalora": True}, "QA-LoRA"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
    "arrow": ({"arrow_config": {"top_k": 3}}, "Arrow"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "velora": ({"velora_config": {"num_groups": 2}}, "VeLoRA"),
    "monteclora": ({"monteclora_config": {"num_samples": 2}}, "MonteCLoRA"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    "megatron": ({"megatron_config": {"tensor_model_parallel_size": 2}}, "Megatron"),
    "target_parameters": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    "pissa": ({"init_lora_weights": "pissa"}, "PiSSA changed the base"),
    "pissa, fast": ({"init_lora_weights": "pissa_niter_16"}, "PiSSA changed the base"),
    "olora": ({"init_lora_weights": "olora"}, "OLoRA changed the base"),
    "corda": ({"init_lora_weights": "corda"}, "CorDA changed the base"),
    "loftq": ({"init_lora_weights": "loftq"}, "LoftQ changed the base"),
    "lora-ga": ({"init_lora_weights": "lora_ga"}, "LoRA-GA changed the base"),
    "another start": ({"init_lora_weights": "moonbeam"}, "moonbeam, which is not known"),
    "an unknown field": ({"use_moonbeams": True}, "use_moonbeams"),
    "bias": ({"bias": "some"}, "bias is some"),
    "rank": ({"r": 0}, "r has 0"),
    "no rank": ({"r": None}, "r has null"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": "2"}}, 'rank_pattern has "2"'),
    "alpha": ({"lora_alpha": "8"}, 'lora_alpha has "8"'),
    "no finite alpha": ({"lora_alpha": float("nan")}, "lora_alpha has NaN"),
    "no number that fits": ({"lora_alpha": 10**400}, "lora_alpha has 1000"),
    "a flag": ({"use_rslora": "yes"}, 'use_rslora is "yes"'),
    "patterns": ({"alpha_pattern": ["q_proj"]}, "alpha_pattern is no object"),
    "tokens": ({"trainable_token_indices": "all"}, "trainable_token_indices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_config_that_cannot_be_merged_is_refused_by_name(adapter: Path, case: str) -> None:
    fields, words = REFUSED[case]
    configure(adapter, **fields)
    with pytest.raises(Refused, match=words) as caught, open_path(adapter):
        pass
    assert caught.value.reason is Reason.ADAPTER and caught.value.hint


def test_what_peft_would_leave_out_is_refused_of_arrivals_alone(home: Home, base: Path, adapter: Path) -> None:
    """What was merged before is still read as it was."""
    configure(adapter, layers_to_transform=[0])
    drop(home, adapter)
    assert "peft leaves it out" in (experts(home)[0].detail or "")
    with open_path(base) as there, open_path(adapter) as merged_before:
        merged_before.check(there.tensors)


def test_a_state_dict_of_the_merged_model_is_refused_and_mended(home: Home, base: Path, tmp_path: Path) -> None:
    """save_file(model.state_dict()) after merge_adapter() would count the adapter twice; the hint is followed."""
    model = trained_model(llama, r=3, target_modules=["q_proj"])
    folder = tmp_path / "merged"
    model.save_pretrained(str(folder))
    wanted = merged(llama, folder)
    model.merge_adapter()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / ADAPTER_WEIGHTS)
    drop(home, folder)
    assert "has the adapter in it already" in (experts(home)[0].detail or "")
    assert "unmerge_adapter" in (experts(home)[0].hint or "")
    model.unmerge_adapter()
    model.save_pretrained(str(tmp_path / "mended"))
    drop(home, tmp_path / "mended")
    assert experts(home)[1].status is Status.MERGED
    assert_close(latest(home, "soup"), {n: t.double() + wanted[n] for n, t in load_file(base).items()})


def test_a_model_file_with_an_adapter_in_it_is_merged_once_it_has_its_name(home: Home, adapter: Path) -> None:
    """What accelerate and Trainer subclasses save of a PeftModel: model.safetensors, adapter and all."""
    model = trained_model(llama, r=3, target_modules=["q_proj"])
    model.save_pretrained(str(home.tmp / "whole"))
    (home.tmp / "whole" / ADAPTER_WEIGHTS).unlink()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, home.tmp / "whole" / "model.safetensors")
    put(home, home.tmp / "whole")
    drain(home)
    (refused,) = experts(home)
    assert refused.reason == "adapter" and f"{ADAPTER_WEIGHTS} by that name" in (refused.hint or "")
    there = home.quarantine(refused.id) / "whole"
    (there / "model.safetensors").rename(there / ADAPTER_WEIGHTS)
    put(home, there)
    drain(home)
    assert experts(home)[-1].status is Status.MERGED


def test_the_daemon_tells_why(home: Home, adapter: Path) -> None:
    configure(adapter, use_qalora=True)
    drop(home, adapter)
    (refused,) = experts(home)
    assert refused.status is Status.QUARANTINED and refused.reason == "adapter"
    told = reason_of(home, refused)
    assert "use_qalora" in told["detail"] and "merge_and_unload" in told["hint"]


@pytest.mark.parametrize("pattern", ["(.*)*x", "a*a*a*b"])
def test_a_pattern_that_could_take_for_ever_goes_to_quarantine(home: Home, adapter: Path, pattern: str) -> None:
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    for name, a, b in (
        ("model.embed_tokens", "_embedding_A", "_embedding_B"),
        ("a" * 12_000, "_A.weight", "_B.weight"),
    ):
        tensors |= {
            f"base_model.model.{name}.lora{a}": torch.ones(3, 64),
            f"base_model.model.{name}.lora{b}": torch.ones(32, 3),
        }
    save_file(tensors, adapter / ADAPTER_WEIGHTS)
    configure(adapter, rank_pattern={pattern: 2})
    drop(home, adapter)
    told = reason_of(home, experts(home)[0])
    assert experts(home)[0].status is Status.QUARANTINED and "the modules' names" in told["hint"], told


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no JSON": (lambda path: path.write_text('{"r": 8'), NotYet, "not JSON"),
    "no object": (lambda path: path.write_text("[]"), Refused, "not an object"),
    "a field twice": (lambda path: path.write_text('{"r": 1, "r": 2}'), Refused, "twice"),
    "nested without end": (lambda path: path.write_text("[" * 100_000), NotYet, "not JSON"),
    "large": (lambda path: path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1)), Refused, "are allowed"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), Refused, "file"),
    "a link": (lambda path: (path.rename(path.with_name("x")), path.symlink_to("x")), Refused, "link"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_config(adapter: Path, case: str) -> None:
    damage, kind, words = BROKEN[case]
    damage(adapter / ADAPTER)
    with pytest.raises(kind, match=words), open_path(adapter, follow=False):
        pass


def test_every_field_that_peft_writes_is_known() -> None:
    """A field that a newer peft adds is refused once it is set: it may change the weights."""
    from peft import LoraConfig

    assert set(LoraConfig().to_dict()) - USED - NO_MATTER - VARIANTS.keys() == set()


def test_each_variant_is_in_the_docs() -> None:
    text = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text()
    assert [key for key in VARIANTS if f"`{key}`" not in text] == []


def _content(base: Path, folder: Path) -> str:
    with open_path(base) as there, open_path(folder) as found:
        found.check(there.tensors)
        return found.content()


def test_an_adapters_content_is_what_it_does(base: Path, adapter: Path) -> None:
    first = _content(base, adapter)
    file, config = adapter / ADAPTER_WEIGHTS, adapter / ADAPTER
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    settings = json.loads(config.read_bytes())
    save_file(weights, file, metadata={"note": "saved again"})
    assert _content(base, adapter) == first
    same = {"lora_dropout": 0.3, "base_model_name_or_path": "elsewhere"}
    other = [{"lora_alpha": 16}, {"use_rslora": True}]
    for change, alike in [(same, True), *((change, False) for change in other)]:
        config.write_text(json.dumps(settings | change))
        assert (_content(base, adapter) == first) is alike
    alpha = settings["lora_alpha"]
    alone = {"lora_alpha": 2 * alpha, "alpha_pattern": {"q_proj": alpha, "down_proj": alpha}}
    config.write_text(json.dumps(settings | alone))
    assert _content(base, adapter) == first  # the same scale, said otherwise
    config.write_text(json.dumps(settings))
    name = next(iter(weights))
    weights[name].view(-1)[0] += 1
    save_file(weights, file)
    assert _content(base, adapter) != first


def test_an_adapter_that_is_saved_again_counts_once(base: Path, adapter: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base, HEADS)
    again = Path(shutil.copytree(adapter, tmp_path / "again"))
    save_file(load_file(adapter / ADAPTER_WEIGHTS), again / ADAPTER_WEIGHTS, metadata={"note": "saved again"})
    for folder in (adapter, again):
        put(home, folder)
        drain(home)
    assert [expert.status for expert in experts(home)] == [Status.MERGED, Status.DUPLICATE]
    assert live(home) == 1
