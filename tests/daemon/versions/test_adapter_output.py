"""The merged task vector as a LoRA adapter: the real peft loads it over the real models, against a float64 oracle."""

import filecmp
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.checkpoints.adapter_config import ADAPTER, ADAPTER_WEIGHTS
from daemon.checkpoints.adapter_modules import modules_of, read_config
from daemon.checkpoints.checkpoint import open_path
from daemon.config import Settings, load
from daemon.errors import BadConfig, DaemonError
from daemon.home.verification import verify
from daemon.layout import ADAPTER_FOLDER, Home
from daemon.manifest import FileEntry
from daemon.pull.pulling import pull
from daemon.versions.adapter import Adapting
from projector.spec import TensorSpec
from projector.watch import SILENT
from tests.daemon.homes import drain, latest, lineage, live, make_home, put, quick
from tests.daemon.processes import environment, forked
from tests.daemon.pulls import served
from tests.models import WEIGHTS as MODEL
from tests.models import read_weights, write_base, write_expert

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported

IDS = torch.arange(12)[None]


def with_peft(test: Any) -> Any:
    """Marks a test of the real libraries."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    skip = pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
    return skip(pytest.mark.filterwarnings("ignore:::(transformers|peft)")(test))  # the libraries' own warnings


def bert() -> Any:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    return BertModel(BertConfig(vocab_size=60, max_position_embeddings=16, **sizes))


def llama(tied: bool = False) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=60, intermediate_size=48, tie_word_embeddings=tied, **sizes))


def tied_llama() -> Any:
    return llama(tied=True)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, n_positions=16, **special))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(vocab_size=60, **sizes))


def ctrl() -> Any:
    from transformers import CTRLConfig, CTRLLMHeadModel

    return CTRLLMHeadModel(CTRLConfig(vocab_size=60, n_positions=16, n_embd=32, dff=48, n_layer=2, n_head=2))


def udop() -> Any:
    from transformers import UdopConfig, UdopForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 2, "max_2d_position_embeddings": 12}
    return UdopForConditionalGeneration(UdopConfig(vocab_size=60, image_size=8, patch_size=4, **sizes))


MODELS = (bert, llama, tied_llama, gpt2, t5, ctrl)


def write_model(path: Path, build: Callable[[], Any]) -> Any:
    """A model with weights far from their initial ones, saved as trainers do."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(path)
    return model


def adapters(rank: int, **tables: Any) -> Settings:
    return quick(**tables, heads={"main": {"adapter": {"rank": rank}}})


def merge(
    home: Home, base: Path, settings: Settings, *, matrices_only: bool = False, experts: int = 2
) -> Mapping[str, Any]:
    """Merges experts near the base; what the manifest says of the last version's adapter."""
    draw = torch.Generator().manual_seed(1)
    weights = load_file(base / MODEL)
    for n in range(experts):
        tuned = {
            name: tensor + 0.05 * torch.randn(tensor.shape, generator=draw)
            if tensor.is_floating_point() and (tensor.ndim == 2 or not matrices_only)
            else tensor
            for name, tensor in weights.items()
        }
        (home.inbox / f"e{n}").mkdir()
        save_file(tuned, home.inbox / f"e{n}" / MODEL, metadata={"format": "pt"})
    drain(home, settings)
    assert live(home) == experts
    return manifest(home)


def manifest(home: Home, version: int | None = None, head: str = "main") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(home.manifest(head, version or live(home, head)).read_bytes())
    return content


def cut(delta: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank, by the full decomposition in float64."""
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def oracle(base: Path, merged: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """(the weights that base and adapter stand for, the share of the task vector's squared norm in them)."""
    wanted, kept, total = {}, 0.0, 0.0
    for name, before in load_file(base / MODEL).items():
        delta = merged[name].double() - before.double()
        moved = cut(delta, rank) if delta.ndim == 2 and name.endswith(".weight") else torch.zeros_like(delta)
        wanted[name] = (before.double() + moved).to(before.dtype) if before.is_floating_point() else before
        kept, total = kept + float(moved.square().sum()), total + float(delta.square().sum())
    return wanted, kept / total


def answers(model: Any) -> Tensor:
    more = {"decoder_input_ids": IDS} if model.config.model_type == "t5" else {}
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS, **more)[0].clone()
    return found


def adapted(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, folder).eval()


@with_peft
@pytest.mark.parametrize("build", MODELS)
def test_peft_gives_what_the_truncated_task_vector_gives(build: Callable[[], Any], tmp_path: Path) -> None:
    rank = 5
    model = write_model(tmp_path / "base", build)
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    said = merge(home, tmp_path / "base", adapters(rank))["adapter"]

    wanted, kept = oracle(tmp_path / "base", latest(home), rank)
    assert said["rank"] == rank
    assert said["kept"] == pytest.approx(kept, rel=1e-5)
    assert 0.1 < said["kept"] < 0.9
    assert said["tensors"].keys() == load_file(tmp_path / "base" / MODEL).keys()
    assert sum(one["share"] for one in said["tensors"].values()) == pytest.approx(1)
    for name, one in said["tensors"].items():
        matrix = wanted[name].ndim == 2
        assert one["rank"] == (min(rank, *wanted[name].shape) if matrix else 0), name
        assert (one["kept"] > 0) == matrix, name

    before = answers(model)
    found = answers(adapted(model, home.latest("main") / ADAPTER_FOLDER))
    reference = build().eval()
    reference.load_state_dict(wanted, strict=False)
    reference.tie_weights()
    torch.testing.assert_close(found, answers(reference), rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.1  # it does something


@with_peft
@pytest.mark.parametrize("build", MODELS)
def test_at_full_rank_it_is_the_merged_model(build: Callable[[], Any], tmp_path: Path) -> None:
    model = write_model(tmp_path / "base", build)
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    said = merge(home, tmp_path / "base", adapters(1000), matrices_only=True)["adapter"]
    assert said["kept"] == pytest.approx(1, abs=1e-12)
    assert all(one["kept"] > 1 - 1e-12 for one in said["tensors"].values())

    merged = type(model).from_pretrained(home.latest("main")).eval()
    wanted, before = answers(merged), answers(model)
    found = answers(adapted(model, home.latest("main") / ADAPTER_FOLDER))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 0.1


@with_peft
def test_nothing_is_left_over_and_nothing_misses_when_peft_loads_it(tmp_path: Path) -> None:
    from peft import PeftConfig, get_peft_model_state_dict

    model = write_model(tmp_path / "base", gpt2)
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    merge(home, tmp_path / "base", adapters(40))
    folder = home.latest("main") / ADAPTER_FOLDER
    held = load_file(folder / ADAPTER_WEIGHTS)
    loaded = get_peft_model_state_dict(adapted(model, folder), save_embedding_layers=False)
    assert loaded.keys() == held.keys()
    assert all(torch.equal(loaded[name], held[name]) for name in held)
    config = PeftConfig.from_pretrained(folder)
    assert config.base_model_name_or_path == "base"
    assert config.inference_mode


def test_a_version_that_was_never_asked_for_one_has_none(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {}), ("other", "mean", {})])
    put(home, write_expert(tmp_path / "a", base, seed=2))
    drain(home, adapters(4))
    for head, version, has in (("main", 0, False), ("main", 1, True), ("other", 1, False)):
        folder = home.version(head, version) / ADAPTER_FOLDER
        assert folder.exists() == has
        assert bool(manifest(home, version, head)["adapter"] if version else None) == has
    names = [file["name"] for file in manifest(home)["files"]]
    assert {f"{ADAPTER_FOLDER}/{ADAPTER}", f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"} < set(names)
    assert ADAPTER not in os.listdir(home.latest("main"))  # loaders would take the version for an adapter
    put(home, write_expert(tmp_path / "b", base, seed=3))
    drain(home)
    assert manifest(home, 2)["adapter"] is None and not (home.version("main", 2) / ADAPTER_FOLDER).exists()


def test_what_did_not_move_gets_no_module(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    weights = read_weights(base)
    weights["layers.0.up.weight"][0] += 1.0  # of rank 1
    weights["layers.1.norm.weight"] += 0.5
    (tmp_path / "a").mkdir()
    save_file(weights, tmp_path / "a" / MODEL)
    put(home, tmp_path / "a")
    drain(home, adapters(4))
    said = manifest(home)["adapter"]
    assert said["tensors"] == {
        "layers.0.up.weight": {"rank": 1, "kept": pytest.approx(1), "share": pytest.approx(0.8)},
        "layers.1.norm.weight": {"rank": 0, "kept": 0.0, "share": pytest.approx(0.2)},
    }
    assert said["kept"] == pytest.approx(0.8)
    folder = home.latest("main") / ADAPTER_FOLDER
    held = load_file(folder / ADAPTER_WEIGHTS)
    path = "base_model.model.layers.0.up"
    assert {name: list(tensor.shape) for name, tensor in held.items()} == {
        f"{path}.lora_A.weight": [4, 16],  # rows of zeros below the first: sizes do not depend on values
        f"{path}.lora_B.weight": [32, 4],
    }
    delta = latest(home)["layers.0.up.weight"] - read_weights(base)["layers.0.up.weight"]
    torch.testing.assert_close(held[f"{path}.lora_B.weight"] @ held[f"{path}.lora_A.weight"], delta)
    assert json.loads((folder / ADAPTER).read_text())["target_modules"] == ["layers.0.up"]


def test_a_version_that_equals_the_base_has_no_adapter(tmp_path: Path) -> None:
    """Where no matrix moved, there is nothing a LoRA could hold; the version itself is published."""
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    weights = read_weights(base)
    weights["layers.1.norm.weight"] += 0.5
    (tmp_path / "a").mkdir()
    save_file(weights, tmp_path / "a" / MODEL)
    put(home, tmp_path / "a")
    drain(home, adapters(4))
    assert live(home) == 1 and manifest(home)["adapter"] is None


def test_shards_and_half_precision(tmp_path: Path) -> None:
    """Of what is published, rounding and all: the adapter follows the published weights, in whatever files they are."""
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    put(home, write_expert(tmp_path / "a", base, seed=2, scale=0.5))
    drain(home, adapters(16, publish={"shard_bytes": 2000, "dtype": "bfloat16"}))
    version = home.latest("main")
    shards = sorted(version.glob("model-*.safetensors"))
    assert len(shards) > 2
    merged = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    held = load_file(version / ADAPTER_FOLDER / ADAPTER_WEIGHTS)
    assert {tensor.dtype for tensor in held.values()} == {torch.float32}
    for name, before in read_weights(base).items():
        if before.ndim == 2 and name != "embed_tokens.weight":
            path = f"base_model.model.{name.removesuffix('.weight')}"
            found = held[f"{path}.lora_B.weight"] @ held[f"{path}.lora_A.weight"]
            torch.testing.assert_close(found, merged[name].float() - before, rtol=0, atol=2e-6)
    found = (
        held["base_model.model.embed_tokens.lora_embedding_B"] @ held["base_model.model.embed_tokens.lora_embedding_A"]
    )
    torch.testing.assert_close(
        found.T, merged["embed_tokens.weight"].float() - read_weights(base)["embed_tokens.weight"], rtol=0, atol=2e-6
    )


def test_verify_and_retention_cover_it(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    put(home, write_expert(tmp_path / "a", base, seed=2))
    drain(home, adapters(4))
    assert problems(home) == []
    path = home.version("main", 1) / ADAPTER_FOLDER / ADAPTER_WEIGHTS
    sound = path.read_bytes()
    path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    assert any(f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}: its sha256" in text for text in problems(home))
    path.unlink()
    assert any(f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}: No such file" in text for text in problems(home))
    path.write_bytes(sound)
    (path.parent / "more").write_bytes(b"")
    assert any(f"{ADAPTER_FOLDER}/more: not in the manifest" in text for text in problems(home))
    (path.parent / "more").unlink()
    assert problems(home) == []
    for n, seed in enumerate((3, 4)):
        put(home, write_expert(tmp_path / f"b{n}", base, seed=seed))
        drain(home, adapters(4, retention={"versions": 1, "grace_seconds": 0}))
    assert not home.version("main", 1).exists() and (home.version("main", 3) / ADAPTER_FOLDER).exists()


def problems(home: Home) -> list[str]:
    with lineage(home) as reader:
        return verify(home, reader, lambda what: None)[1]


def test_a_rebuild_makes_the_adapter_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an expert the version is another, and so is its adapter: that of a home that never had it."""
    for name, value in environment({"MAINSTEM_HEADS": '{"main": {"adapter": {"rank": 3}}}'}).items():
        monkeypatch.setenv(name, value)
    base = write_base(tmp_path / "base", seed=1)
    heads = [("main", "opcm", {}), ("soup", "mean", {})]
    homes = [make_home(tmp_path / name, base, heads) for name in ("home", "plain")]
    for home, seeds in zip(homes, ((2, 3, 4), (2, 4)), strict=True):
        for seed in seeds:
            put(home, write_expert(tmp_path / f"e{seed}", base, seed=seed), f"e{seed}")
            drain(home, load(home.config, {"inbox": {"settle_seconds": 0}}))
    done = forked("rebuild", "--home", homes[0].root, "--without", "e3")
    assert done.returncode == 0, done.stderr
    assert live(homes[0]) == 4 and problems(homes[0]) == []
    held, wanted = (load_file(home.latest("main") / ADAPTER_FOLDER / ADAPTER_WEIGHTS) for home in homes)
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    assert manifest(homes[0], 4)["adapter"] == manifest(homes[1], 2)["adapter"]
    assert manifest(homes[0], 4, "soup")["adapter"] is None


def test_killed_at_any_file_a_version_has_its_adapter_or_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment({"MAINSTEM_HEADS": '{"main": {"adapter": {"rank": 3}}}'}).items():
        monkeypatch.setenv(name, value)
    base = write_base(tmp_path / "base", seed=1)
    fresh = make_home(tmp_path / "fresh", base, [("main", "mean", {})])
    put(fresh, write_expert(tmp_path / "a", base, seed=2))
    begun, expected = 0, ""
    for nth in count(1):
        home = Home(shutil.copytree(fresh.root, tmp_path / f"{nth}", symlinks=True))
        with monkeypatch.context() as patch:
            patch.setenv("MAINSTEM_FAILPOINT", f"file.create=kill:{nth}")
            ended = forked("run", "--once", "--no-http", "--home", home.root)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        begun += any(home.tmp.glob(f"*/main/published/{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}"))
        assert (home.version("main", 1)).exists() <= (
            home.version("main", 1) / ADAPTER_FOLDER / ADAPTER_WEIGHTS
        ).exists()
        ended = forked("run", "--once", "--no-http", "--home", home.root)
        assert ended.returncode == 0, ended.stderr
        assert live(home) == 1 and problems(home) == [] and not os.listdir(home.tmp)
        digest = hashlib.sha256((home.latest("main") / ADAPTER_FOLDER / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
        expected = expected or digest
        assert digest == expected  # the same bits, wherever it was cut short
        shutil.rmtree(home.root)
    assert begun >= 3  # the adapter was there, the version not yet


def test_a_head_that_the_home_does_not_have_is_refused_by_its_name(home: Home) -> None:
    with pytest.raises(BadConfig, match=r"heads\.mian is set") as refused:
        drain(home, quick(heads={"mian": {"adapter": {"rank": 4}}}))
    assert "its heads are main" in refused.value.hint
    home.config.write_text("[heads.mian.adapter]\nrank = 4\n")
    for words in (("config", "check"), ("run", "--once", "--no-http")):
        done = forked(*words, "--home", home.root)
        assert done.returncode == 1 and "heads.mian is set" in done.stderr, done.stderr


def test_the_settings_show_it(home: Home) -> None:
    home.config.write_text("[heads.main.adapter]\nrank = 64\n")
    shown = forked("config", "show", "--json", "--home", home.root)
    assert json.loads(shown.stdout)["heads.main.adapter.rank"] == 64
    table = forked("config", "show", "--home", home.root).stdout
    assert any(line.split()[:2] == ["heads.main.adapter.rank", "64"] for line in table.splitlines()), table
    assert forked("config", "check", "--home", home.root).returncode == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[heads.main.adapter]\nrank = 0\n", "heads.main.adapter.rank"),
        ('[heads.main.adapter]\nrank = "many"\n', "heads.main.adapter.rank"),
        ("[heads.main.adapter]\nranks = 4\n", "heads.main.adapter.rank"),
        ("[heads.main]\nadpater = 4\n", "heads.main.adpater"),
        ("[heads]\nmain = 4\n", "heads.main"),
    ],
)
def test_what_is_wrong_in_the_table_is_named(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / "mainstem.toml").write_text(text)
    with pytest.raises(BadConfig, match=named.replace(".", r"\.")):
        load(tmp_path / "mainstem.toml")


def test_the_environment_can_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mainstem.toml").write_text("[heads.main.adapter]\nrank = 64\n")
    monkeypatch.setenv("MAINSTEM_HEADS", '{"init": {"adapter": {"rank": 8}}}')
    assert load(tmp_path / "mainstem.toml").flat()["heads.main.adapter.rank"] == 64
    assert load(tmp_path / "mainstem.toml").flat()["heads.init.adapter.rank"] == 8
    monkeypatch.setenv("MAINSTEM_HEADS__MAIN__ADAPTER__RANK", "32")
    assert load(tmp_path / "mainstem.toml").flat()["heads.main.adapter.rank"] == 32


def test_a_matrix_that_does_not_fit_into_memory_is_refused_at_the_start(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    put(home, write_expert(tmp_path / "a", base, seed=2))
    with pytest.raises(BadConfig, match="bytes of memory for the adapter") as refused:
        drain(home, adapters(4, compute={"memory_budget": 10 << 20, "block_bytes": 1 << 16}))
    assert "compute.memory_budget" in refused.value.hint
    assert os.listdir(home.inbox) and live(home) == 0


@pytest.mark.parametrize(
    ("name", "shape", "config", "found"),
    [
        ("h.0.attn.c_attn.weight", (4, 12), {"model_type": "gpt2"}, [("h.0.attn.c_attn", False, True)]),
        ("h.0.attn.c_attn.weight", (12, 4), {"model_type": "gpt_bigcode"}, [("h.0.attn.c_attn", False, False)]),
        ("d.c_fc.weight", (4, 12), {"decoder": {"model_type": "gpt2"}}, [("d.c_fc", False, True)]),
        ("x.query.weight", (4, 4), {}, [("x.query", False, False)]),
        ("e.position_embeddings.weight", (9, 4), {}, [("e.position_embeddings", True, True)]),
        ("embeddings_project.weight", (9, 4), {}, [("embeddings_project", False, False)]),
        ("layer.mlp.gate.weight", (8, 4), {}, []),  # of a mixture of experts
        ("layer.mlp.gate_proj.weight", (8, 4), {}, [("layer.mlp.gate_proj", False, False)]),
        ("layer.norm.weight", (4,), {}, []),
        ("layer.query.bias", (4,), {}, []),
        ("conv.weight", (4, 3, 2, 2), {}, []),
        ("experts.gate_up_proj", (3, 4, 4), {}, []),
        ("class_embedding", (4, 4), {}, []),  # a bare parameter belongs to no module of its own
        ("empty.weight", (0, 4), {}, []),
        (
            "model.shared.weight",
            (9, 4),
            {"architectures": ["BartForConditionalGeneration"]},
            [
                ("model.shared", True, True),
                ("model.encoder.embed_tokens", True, True),
                ("model.decoder.embed_tokens", True, True),
                ("lm_head", False, False),
            ],
        ),
        (
            "transformer.w.weight",
            (9, 4),
            {"architectures": ["CTRLLMHeadModel"], "model_type": "ctrl"},
            [("transformer.w", True, True), ("lm_head", False, False)],
        ),
        ("w.weight", (9, 4), {"architectures": ["CTRLModel"], "model_type": "ctrl"}, [("w", True, True)]),
        ("x.w.weight", (9, 4), {"architectures": ["OtherLMHeadModel"]}, [("x.w", False, False)]),
        ("a.relative_attention_bias.weight", (8, 2), {"model_type": "udop"}, []),  # one matrix, three modules
        ("a.relative_attention_bias.weight", (8, 2), {"model_type": "t5"}, [("a.relative_attention_bias", True, True)]),
        (
            "model.decoder.embed_tokens.weight",
            (9, 4),
            {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"},
            [("model.decoder.embed_tokens", True, True), ("proj_out", False, False)],
        ),
        (
            "model.embed_tokens.weight",
            (9, 4),
            {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False},
            [("model.embed_tokens", True, True)],
        ),
        ("model.embed_tokens.weight", (9, 4), {"architectures": ["LlamaModel"]}, [("model.embed_tokens", True, True)]),
        ("bert.embeddings.word_embeddings.weight", (9, 4), {"architectures": ["BertForMaskedLM"]}, []),
        # the output layer is tied to these too, under names of its own: peft would leave it behind
        ("bert.embeddings.word_embeddings.weight", (9, 4), {"architectures": ["BertLMHeadModel"]}, []),
        ("text_model.model.embed_tokens.weight", (9, 4), {"architectures": ["Kosmos2ForConditionalGeneration"]}, []),
        ("transformer.embeddings.weight", (9, 4), {"architectures": ["XLMWithLMHeadModel"]}, []),
        ("transformer.word_embedding.weight", (9, 4), {"architectures": ["XLNetLMHeadModel"]}, []),
        (
            "decoder.bert.embeddings.word_embeddings.weight",
            (9, 4),
            {"architectures": ["VisionEncoderDecoderModel"], "tie_word_embeddings": False},
            [],
        ),
    ],
)
def test_which_modules_move_a_tensor(
    name: str, shape: tuple[int, ...], config: dict[str, Any], found: list[tuple[str, bool, bool]]
) -> None:
    spec = TensorSpec(name, shape, torch.float32)
    modules = modules_of(spec, {name: spec}, config)
    assert [(module.path, module.embedding, module.turned) for module in modules] == found


@with_peft
@pytest.mark.parametrize("build", [tied_llama, gpt2, t5, ctrl, udop])
def test_a_tied_matrix_moves_in_all_of_its_modules_or_in_none(build: Callable[[], Any], tmp_path: Path) -> None:
    model = write_model(tmp_path, build)
    base = {name: TensorSpec(name, tuple(w.shape), w.dtype) for name, w in load_file(tmp_path / MODEL).items()}
    names: dict[int, set[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), set()).add(name)
    tied = [group for group in names.values() if len(group) > 1]
    moved = {
        name: {f"{one.path}.weight" for one in modules_of(base[name], base, read_config(tmp_path))} for name in base
    }
    for group in tied:
        (stored,) = group & base.keys()
        assert moved[stored] in (set(), group)
    assert all(not moved[name] or moved[name] == {name} for name in base.keys() - set().union(*tied))
    (tokens,) = [group for group in tied if "lm_head.weight" in group]
    assert tokens in moved.values()


def test_an_output_layer_of_its_own_is_not_tied() -> None:
    config = {"architectures": ["LlamaForCausalLM"]}
    base = {name: TensorSpec(name, (9, 4), torch.float32) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    modules = [module for spec in base.values() for module in modules_of(spec, base, config)]
    assert [(module.path, module.embedding) for module in modules] == [("model.embed_tokens", True), ("lm_head", False)]


@pytest.mark.parametrize("text", [None, "", "[]", "{", '{"architectures": 3, "model_type": []}'])
def test_a_config_that_cannot_be_read_is_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    spec = TensorSpec("model.embed_tokens.weight", (9, 4), torch.float32)
    assert len(modules_of(spec, {spec.name: spec}, read_config(tmp_path))) == 1


def test_the_number_of_workers_does_not_change_the_bits(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    weights = []
    for threads in (1, 3):
        folder = tmp_path / f"{threads}"
        shutil.copytree(write_expert(tmp_path / f"e{threads}", base, seed=2), folder)
        with open_path(home.base) as opened:
            settings = adapters(4, compute={"threads": threads})
            adapting = Adapting(home, opened.tensors, settings, SILENT)
            assert adapting.write("main", folder, [FileEntry(MODEL, 0, "")], "base")
        weights.append((folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS).read_bytes())
    assert weights[0] == weights[1]


def test_it_is_served_and_pulled_on_its_own(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    for n in (1, 2):
        put(home, write_expert(tmp_path / f"{n}", base, seed=n + 1))
        drain(home, adapters(4))
    folder = home.version("main", 2)
    with served(home) as url:
        for name in (ADAPTER, ADAPTER_WEIGHTS):
            path = f"/v1/heads/main/versions/2/files/{ADAPTER_FOLDER}/{name}"
            assert httpx.get(url + path, trust_env=False).content == (folder / ADAPTER_FOLDER / name).read_bytes()
        for name in (
            f"{ADAPTER_FOLDER}/%2e%2e/{MODEL}",
            ADAPTER_FOLDER,
            f"{ADAPTER_FOLDER}/",
            f"/{MODEL}",
            "..%2f..%2f0",
        ):
            assert httpx.get(f"{url}/v1/heads/main/versions/2/files/{name}", trust_env=False).status_code == 404, name
        pulled = pull(url, tmp_path / "alone", adapter=True)
        assert (pulled.version, pulled.files) == (2, 2)
        assert sorted(os.listdir(tmp_path / "alone")) == [ADAPTER_FOLDER, "manifest.json"]
        assert not filecmp.dircmp(folder / ADAPTER_FOLDER, tmp_path / "alone" / ADAPTER_FOLDER).diff_files
        assert pull(url, tmp_path / "alone", adapter=True).up_to_date
        assert pull(url, tmp_path / "alone", version="1", adapter=True).version == 1  # in its place
        assert pull(url, tmp_path / "whole").files == len(manifest(home, 2)["files"])
        assert (tmp_path / "whole" / ADAPTER_FOLDER / ADAPTER_WEIGHTS).exists()
        with pytest.raises(DaemonError, match="main/0 has no adapter") as refused:
            pull(url, tmp_path / "none", version="0", adapter=True)
        assert "heads.main.adapter.rank" in refused.value.hint
        done = forked("pull", url, tmp_path / "verb", "--adapter")
        assert done.returncode == 0 and "main/2: 2 files" in done.stdout, done.stderr
        assert forked("pull", url, tmp_path / "verb2", "--adapter", "--view", "1").returncode == 2


def test_a_link_in_place_of_its_folder_is_not_followed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", seed=1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    put(home, write_expert(tmp_path / "1", base, seed=2))
    drain(home, adapters(4))
    folder = home.version("main", 1) / ADAPTER_FOLDER
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with served(home) as url:
        path = f"/v1/heads/main/versions/1/files/{ADAPTER_FOLDER}/{ADAPTER}"
        assert httpx.get(url + path, trust_env=False).status_code == 500
