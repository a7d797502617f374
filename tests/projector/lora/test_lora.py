"""Adapters as experts, against the real peft: the delta of each tensor is what merge_and_unload() adds to it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import projector.lora.expert
from projector.errors import BadSchema, Reason
from projector.lora.delta import Parts, Patch, factors_of
from projector.names.naming import Naming
from tests import adapters
from tests.adapters import configure, deltas, expert, gpt2, llama, merged, rewrite, train, write

pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

TOLERANCE = 1e-6  # of the largest value of the delta
Q = ["q_proj", "v_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"target_modules": [*Q, "lm_head"], "lora_alpha": 3}),
    "rslora": ("llama", {"target_modules": Q, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": [*Q, "up_proj", "down_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r"layers\.\d+\.mlp\.up_proj": 3, "up_proj": 5, "v": 7},
            "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 11, "down_proj": 1, ".*down_proj": 99},
        },
    ),
    "patterns and rslora": ("llama", {"target_modules": Q, "use_rslora": True, "rank_pattern": {"v_proj": 2}}),
    "every linear": ("llama", {"target_modules": "all-linear"}),
    "conv1d of gpt-2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d not said": ("gpt2", {"target_modules": ["c_attn", "c_fc"]}),
    "lora_bias": ("bert", {"target_modules": ["query", "dense"], "lora_bias": True, "lora_alpha": 5}),
    "bias all": ("bert", {"target_modules": ["query"], "bias": "all"}),
    "bias lora_only": ("bert", {"target_modules": ["query"], "bias": "lora_only"}),
    "lora_bias on trained biases": ("bert", {"target_modules": ["query"], "lora_bias": True, "bias": "all"}),
    "modules_to_save": ("bert", {"target_modules": ["value"], "modules_to_save": ["classifier", "LayerNorm"]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", *Q]}),
    "embedding, tied": ("tied_llama", {"target_modules": ["embed_tokens"]}),
    "embedding saved, tied": (
        "tied_llama",
        {"target_modules": Q, "modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "embedding of ctrl": ("ctrl", {"target_modules": ["w", "Wq"]}),
    "embedding of ctrl saved": (
        "ctrl",
        {"target_modules": ["Wq"], "modules_to_save": ["w", "lm_head"], "ensure_weight_tying": True},
    ),
    "embedding of udop": ("udop", {"target_modules": ["shared", "q"]}),
    "embedding of udop saved": ("udop", {"target_modules": ["q"], "modules_to_save": ["shared"]}),
    "one name of udop's bias": (
        "udop",
        {"target_modules": ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"]},
    ),
    "tokens": ("llama", {"target_modules": Q, "trainable_token_indices": [7, 3, 39]}),
    "tokens, tied": ("tied_llama", {"target_modules": Q, "trainable_token_indices": {"embed_tokens": [0, 5]}}),
    "convolutions": ("convolutions", {"target_modules": ["one", "two", "small", "three"]}),
    "convolutions, lora_bias": ("convolutions", {"target_modules": ["one", "small", "three"], "lora_bias": True}),
    "dora": ("llama", {"target_modules": [*Q, "down_proj"], "use_dora": True, "lora_alpha": 20}),
    "dora of conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "fan_in_fan_out": True}),
    "dora of an embedding": ("llama", {"target_modules": ["embed_tokens", "v_proj"], "use_dora": True}),
    "dora of convolutions": ("convolutions", {"target_modules": ["one", "two", "three"], "use_dora": True}),
    "orthogonal start": ("llama", {"target_modules": Q, "init_lora_weights": "orthogonal"}),
}


def model_of(kind: str) -> Callable[[], nn.Module]:
    model: Callable[[], nn.Module] = getattr(adapters, kind)
    return model


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The base's file leaves out what is tied; what it has must be what peft says."""
    assert any(tensor.any() for tensor in found.values())
    for name, delta in found.items():
        largest = wanted[name].abs().max()
        assert (delta.double() - wanted[name]).abs().max() <= TOLERANCE * largest, name


@pytest.mark.parametrize("case", CASES)
def test_the_delta_is_what_peft_adds(tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    model = model_of(kind)
    base = write(model, tmp_path)
    folder = train(model, tmp_path / "adapter", **{"r": 4, **settings})
    wanted = merged(model, folder)
    assert_same(deltas(base, folder), wanted)
    assert_same(deltas(base, folder, rows=3), wanted)


WHOLLY = {"rslora", "patterns", "patterns and rslora", "every linear", "orthogonal start"}
WHOLLY |= {"conv1d of gpt-2", "conv1d not said", "embedding of ctrl", "embedding of udop", "one name of udop's bias"}
NOT = {"dora", "dora of conv1d", "dora of an embedding", "dora of convolutions"}
NOT |= {"embedding, tied", "convolutions", "convolutions, lora_bias"}  # peft saves a trained embedding whole beside it


@pytest.mark.parametrize("case", CASES)
def test_factors_are_given_where_their_product_is_the_delta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    kind, settings = CASES[case]
    base = write(model_of(kind), tmp_path)
    folder = train(model_of(kind), tmp_path / "adapter", **{"r": 4, **settings})
    monkeypatch.setattr(projector.lora.expert, "SMALL", 4)  # the models are narrow
    given = []
    with expert(base, folder) as (source, there):
        for name in filter(source.touches, source.order):
            for rows in (slice(None), slice(0, 2)):
                fetched = source.fetch(there.schema[name], rows if rows.stop else None)
                factors = source.factors(there.schema[name], fetched)
                delta = source.delta(there.schema[name], there.read(name)[rows], fetched)
                given.append(factors is not None)
                if factors:
                    assert all(factor.dtype == torch.float64 for factor in factors)
                    assert (factors[0] @ factors[1] - delta).abs().max() <= 1e-7 * delta.abs().max(), name
    print(case, given)
    assert all(given) == (case in WHOLLY) and any(given) == (case not in NOT)


def test_factors_are_given_where_they_are_small_and_nothing_cancels_in_them(tmp_path: Path) -> None:
    """An adapter converted from another start is [B, -B0] [A; A0], most of which cancels."""
    base = write(llama, tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    folder = train(llama, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    with expert(base, folder) as (source, there):  # 16 x 16: two directions save nothing
        assert source.factors(there.schema[name], source.fetch(there.schema[name], None)) is None
    generator = torch.Generator().manual_seed(1)
    (b, b0), a0 = torch.randn(2, 60, 1, generator=generator), torch.randn(1, 80, generator=generator)
    up, down = torch.cat([b, b + 1e-4 * b0], 1), torch.cat([a0, -a0])
    factors = factors_of(Patch(a="a", b="b"), Parts(up=up, down=down))
    assert factors is not None
    delta = up.double() @ down.double()
    assert all(factor.norm() <= 2 * max(1.4, float(delta.norm())) for factor in factors)
    rounded = factors[0].float() @ factors[1].float()
    assert (rounded - delta).norm() <= 1e-6 * delta.norm()
    assert (up @ down - delta).norm() > 1e-5 * delta.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write(llama, tmp_path)
    folder = train(llama, tmp_path / "adapter", r=4, target_modules=Q)
    rewrite(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    assert_same(deltas(base, folder), merged(llama, folder))


def test_a_start_that_peft_makes_in_float32_only(tmp_path: Path) -> None:
    base = write(llama, tmp_path)
    folder = train(llama, tmp_path / "adapter", r=4, target_modules=Q, init_lora_weights="mica")
    found = deltas(base, folder)
    configure(folder, init_lora_weights=True)  # what it starts from, before it is overwritten
    assert_same(found, merged(llama, folder))


def test_what_is_not_touched_is_zero_and_reads_nothing(tmp_path: Path) -> None:
    base = write(llama, tmp_path)
    folder = train(llama, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    with expert(base, folder) as (source, there):
        assert list(source.order) == list(there.order)
        touched = [name for name in source.order if source.touches(name)]
        assert touched == [name for name in source.order if name.endswith("q_proj.weight")] != []
        reads: list[str] = []
        plain = source.read
        source.read = lambda name, rows=None: reads.append(name) or plain(name, rows)  # type: ignore[method-assign,func-returns-value]
        for name in source.order:
            fetched = source.fetch(there.schema[name], None)
            assert bool(fetched) == (name in touched) == bool(reads)
            reads.clear()
            if name not in touched:
                delta = source.delta(there.schema[name], there.read(name), fetched)
                assert delta.dtype == torch.float32 and not delta.any() and delta.shape == there.schema[name].shape


def test_a_block_of_rows_reads_these_rows_of_b(tmp_path: Path) -> None:
    base = write(llama, tmp_path)
    folder = train(llama, tmp_path / "adapter", r=2, target_modules=["down_proj"])
    with expert(base, folder) as (source, there):
        name = "model.layers.0.mlp.down_proj.weight"
        up, down = source.fetch(there.schema[name], slice(4, 7))
        assert up.shape == (3, 2) and down.shape == (2, 24)
        assert source.fetch(there.schema[name], slice(7, 9))[1] is down  # A is read once for all blocks


def test_a_base_without_its_prefix(tmp_path: Path) -> None:
    """An adapter of the model with a head, the base saved as the bare model: names by admission.prefixes alone."""
    whole = write(llama, tmp_path)
    (tmp_path / "bare").mkdir()
    bare = write(lambda: llama().model, tmp_path / "bare")  # type: ignore[arg-type,return-value]
    folder = train(llama, tmp_path / "adapter", r=2, target_modules=Q)
    wanted = {name.removeprefix("model."): delta for name, delta in deltas(whole, folder).items()}
    found = deltas(bare, folder, naming=Naming({"model.": ""}))
    assert all(torch.equal(delta.bool(), wanted[name].bool()) for name, delta in found.items())
    with pytest.raises(BadSchema, match="the base has no") as caught:
        deltas(bare, folder)
    assert 'prefixes = {"model." = ""}' in caught.value.hint


def test_ignored_modules_are_left_out(tmp_path: Path) -> None:
    def encoder() -> nn.Module:
        return adapters.bert().bert  # type: ignore[return-value]

    base = write(encoder, tmp_path)
    folder = train(adapters.bert, tmp_path / "adapter", r=2, target_modules=["query"], modules_to_save=["classifier"])
    naming = Naming({"bert.": ""}, ["classifier.*"])
    assert any(delta.any() for delta in deltas(base, folder, naming=naming).values())
    with pytest.raises(BadSchema, match="the base has no classifier"):
        deltas(base, folder, naming=Naming({"bert.": ""}))


def test_an_embedding_trained_tied_counts_once(tmp_path: Path) -> None:
    """peft saves its factors for the output layer too; its own merge adds both to the one matrix. What was trained is
    the model as it ran before any merge."""
    base = write(adapters.tied_llama, tmp_path)
    settings = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}
    folder = train(adapters.tied_llama, tmp_path / "adapter", r=4, **settings)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert any("lm_head.lora_A" in name for name in names) and any("lora_embedding_A" in name for name in names)
    found = deltas(base, folder)
    tokens = torch.arange(10)[None]

    def model() -> nn.Module:
        torch.manual_seed(1)  # as `write` and `train` do
        return adapters.tied_llama()

    with torch.no_grad():
        trained = PeftModel.from_pretrained(model(), str(folder))(tokens).logits  # type: ignore[arg-type]
        merged_once, plain = model(), model()
        for name, parameter in merged_once.named_parameters():
            parameter += found[name]
        assert torch.allclose(merged_once(tokens).logits, trained, rtol=0, atol=1e-6)
        assert not torch.allclose(plain(tokens).logits, trained, rtol=0, atol=1e-3)
    for apart in ({"alpha_pattern": {"lm_head": 400}}, {"rank_pattern": {"lm_head": 7}}):
        configure(folder, **{"alpha_pattern": {}, "rank_pattern": {}, **apart})
        with pytest.raises(BadSchema, match="is tied to"):
            deltas(base, folder)
    configure(folder, rank_pattern={})
    rewrite(folder, lambda t: t.update({n: t[n] + 1 for n in t if "lm_head.lora_A" in n}))
    with pytest.raises(BadSchema, match="is tied to"):
        deltas(base, folder)


def test_biases_trained_beside_a_saved_head(tmp_path: Path) -> None:
    """With bias=all peft also saves the head's biases as the wrapper has them, which it does not read again."""
    base = write(adapters.bert, tmp_path)
    settings = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}
    folder = train(adapters.bert, tmp_path / "adapter", r=4, **settings)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert any("original_module" in name for name in names) and any(".modules_to_save." in name for name in names)
    assert_same(deltas(base, folder), merged(adapters.bert, folder))


def test_biases_of_a_head_of_several_layers_and_of_a_tied_one(tmp_path: Path) -> None:
    """As peft names them: with the adapter's name in between, and the output layer's bias under both its names."""
    base = write(adapters.bert, tmp_path)
    settings = {"target_modules": ["query"], "bias": "all", "modules_to_save": ["pooler"]}
    folder = train(adapters.bert, tmp_path / "adapter", r=4, **settings)
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert any(".modules_to_save.default.dense.bias" in name for name in names)
    wanted = merged(adapters.bert, folder)
    assert_same(deltas(base, folder), wanted)
    prefix = "base_model.model.bert.pooler.dense"
    rewrite(folder, lambda t: t.update({f"{prefix}.twin.bias": t[f"{prefix}.bias"].clone()}))
    assert_same(deltas(base, folder), wanted)
    rewrite(folder, lambda t: t.update({f"{prefix}{name}.bias": torch.zeros(16) for name in ("", ".twin")}))
    with pytest.raises(BadSchema, match=r"no bert\.pooler\.dense\.twin\.bias"):  # alike by chance
        deltas(base, folder)
    rewrite(folder, lambda t: t.update({f"{prefix}.twin.bias": t[f"{prefix}.bias"] + 1}))
    with pytest.raises(BadSchema, match=r"no bert\.pooler\.dense\.twin\.bias") as caught:
        deltas(base, folder)
    assert 'ignore = ["bert.pooler.dense.twin.*"]' in caught.value.hint


REFUSED: dict[str, tuple[str, dict[str, Any], Reason, str]] = {
    "a head that is tied": (
        "tied_llama",
        {"target_modules": ["lm_head"]},
        Reason.UNEXPECTED_TENSOR,
        "tied to model.embed_tokens.weight",
    ),
    "a tied head saved apart": (
        "tied_llama",
        {"target_modules": Q, "modules_to_save": ["lm_head"]},
        Reason.UNEXPECTED_TENSOR,
        "tied to model.embed_tokens.weight",
    ),
    "the head of ctrl": ("ctrl", {"target_modules": ["lm_head"]}, Reason.UNEXPECTED_TENSOR, "tied to transformer.w"),
    "the head of ctrl and its embedding": (
        "ctrl",
        {"target_modules": ["w", "lm_head"]},
        Reason.UNEXPECTED_TENSOR,
        "no lm_head.weight: if it is tied to transformer.w",
    ),
    "the head of ctrl saved apart": (
        "ctrl",
        {"target_modules": ["Wq"], "modules_to_save": ["w", "lm_head"]},
        Reason.UNEXPECTED_TENSOR,
        "tied to transformer.w",
    ),
    "the head of udop": ("udop", {"target_modules": ["lm_head"]}, Reason.UNEXPECTED_TENSOR, "tied to shared.weight"),
    "an embedding of udop by another name": (
        "udop",
        {"target_modules": ["encoder.embed_tokens"]},
        Reason.UNEXPECTED_TENSOR,
        "no encoder.embed_tokens.weight: if it is tied to shared.weight",
    ),
    "a bias of udop by another name": (
        "udop",
        {"target_modules": ["encoder.relative_bias.biases.0.relative_attention_bias"]},
        Reason.UNEXPECTED_TENSOR,
        "biases.0.relative_attention_bias.weight: if it is tied to another tensor there",
    ),
    "lora_bias without a bias": (
        "llama",
        {"target_modules": Q, "lora_bias": True},
        Reason.UNEXPECTED_TENSOR,
        "lora_bias",
    ),
    "a rank that no weight has": ("llama", {"target_modules": Q, "r": 1025}, Reason.WRONG_SHAPE, "of rank 1025"),
    "a convolution in groups": ("convolutions", {"target_modules": ["grouped"]}, Reason.WRONG_SHAPE, "in groups"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_is_refused_by_name(tmp_path: Path, case: str) -> None:
    kind, settings, reason, words = REFUSED[case]
    base = write(model_of(kind), tmp_path)
    folder = train(model_of(kind), tmp_path / "adapter", **{"r": 2, **settings})
    with pytest.raises(BadSchema, match=words) as caught:
        deltas(base, folder)
    assert caught.value.reason is reason and caught.value.hint


def test_an_adapter_of_another_architecture_is_told_apart_from_one_with_a_head_of_its_own(tmp_path: Path) -> None:
    base = write(llama, tmp_path)
    folder = train(adapters.bert, tmp_path / "bert", r=2, target_modules=["query"])
    with pytest.raises(BadSchema, match="nor anything else that this adapter changes") as caught:
        deltas(base, folder)
    assert caught.value.reason is Reason.WRONG_BASE and "merge_and_unload" in caught.value.hint
    folder = train(llama, tmp_path / "deeper", r=2, target_modules=["q_proj"])
    rewrite(
        folder, lambda t: t.update({n.replace("layers.1", "layers.2"): t.pop(n) for n in list(t) if "layers.1" in n})
    )
    with pytest.raises(BadSchema, match="nothing there has that name") as caught:
        deltas(base, folder)
    assert caught.value.reason is Reason.UNEXPECTED_TENSOR and "of as many layers" in caught.value.hint
    folder = train(llama, tmp_path / "renamed", r=2, target_modules=Q)
    rewrite(folder, lambda t: t.update({n.replace("v_proj", "value"): t.pop(n) for n in list(t) if "v_proj" in n}))
    with pytest.raises(BadSchema, match=r"value\.weight: nothing there has that name") as caught:
        deltas(base, folder)
    assert "merge_and_unload" in caught.value.hint and "ignore" not in caught.value.hint


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = A.replace("lora_A", "lora_B")
DAMAGED: dict[str, tuple[Callable[[dict[str, Tensor]], object], Reason, str]] = {
    "no B": (lambda t: t.pop(B), Reason.MISSING_TENSOR, "no lora_B beside"),
    "no A": (lambda t: t.pop(A), Reason.MISSING_TENSOR, "no lora_A beside"),
    "empty": (lambda t: t.update({A: torch.empty(0)}), Reason.WRONG_SHAPE, "a part of it, or nothing"),
    "one dimension": (lambda t: t.update({B: t[B].flatten()}), Reason.WRONG_SHAPE, "a part of it, or nothing"),
    "another rank": (
        lambda t: t.update({A: t[A][:1].clone(), B: t[B][:, :1].clone()}),
        Reason.WRONG_SHAPE,
        "rank 1 and 1",
    ),
    "another base": (lambda t: t.update({A: torch.ones(2, 9)}), Reason.WRONG_SHAPE, "the weight is"),
    "whole numbers": (lambda t: t.update({A: t[A].to(torch.int8)}), Reason.UNSUPPORTED_DTYPE, "is int8"),
    "a KaSA diagonal": (
        lambda t: t.update({A.replace("lora_A.weight", "lora_diag"): torch.ones(2)}),
        Reason.UNEXPECTED_TENSOR,
        "lora_diag",
    ),
    "two adapters in one file": (
        lambda t: t.update({A.replace(".weight", f".{name}.weight"): t[A].clone() for name in ("one", "two")}),
        Reason.UNEXPECTED_TENSOR,
        "several adapters: one, two",
    ),
    "a magnitude without DoRA": (
        lambda t: t.update({A.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(16)}),
        Reason.MISSING_TENSOR,
        "only one of use_dora",
    ),
    "an offset without lora_bias": (
        lambda t: t.update({B.replace(".weight", ".bias"): torch.ones(16)}),
        Reason.UNEXPECTED_TENSOR,
        "no model.layers.0.self_attn.q_proj.bias",
    ),
    "quantised": (
        lambda t: t.update({A.replace("lora_A.weight", "base_layer.weight.absmax"): torch.ones(2)}),
        Reason.UNSUPPORTED_DTYPE,
        "bitsandbytes",
    ),
    "a resized vocabulary": (
        lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(41, 16)}),
        Reason.WRONG_SHAPE,
        r"\[41, 16\] instead of \[40, 16\]",
    ),
    "a part twice": (
        lambda t: t.update({A.removeprefix("base_model.model."): t[A].clone()}),
        Reason.UNEXPECTED_TENSOR,
        "same part",
    ),
    "nothing at all": (lambda t: t.clear(), Reason.MISSING_TENSOR, "no tensor"),
    "stacked experts": (
        lambda t: t.update(
            {
                "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 3, 4),
                "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight": torch.ones(2, 2),
            }
        ),
        Reason.WRONG_SHAPE,
        "the weight is",
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sound")
    return write(llama, folder), train(llama, folder / "adapter", r=2, target_modules=["q_proj"])


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, sound: tuple[Path, Path], case: str) -> None:
    change, reason, words = DAMAGED[case]
    base, folder = sound
    copied = tmp_path / "adapter"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    rewrite(copied, change)
    with pytest.raises(BadSchema, match=words) as caught:
        deltas(base, copied)
    assert caught.value.reason is reason and caught.value.hint


def test_a_long_name_makes_no_long_hint(tmp_path: Path, sound: tuple[Path, Path]) -> None:
    base, folder = sound
    copied = tmp_path / "adapter"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    rewrite(copied, lambda t: t.update({f"{'x' * 100_000}.model.norm.weight": torch.ones(16)}))
    with pytest.raises(BadSchema) as caught:
        deltas(base, copied)
    assert len(str(caught.value)) + len(caught.value.hint) < 1000


def test_a_square_matrix_with_a_flag_that_others_belie(tmp_path: Path) -> None:
    """peft sets fan_in_fan_out from the last layer that it meets: where layers differ, it says nothing of a square."""
    base = write(gpt2, tmp_path)
    folder = train(gpt2, tmp_path / "adapter", r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    configure(folder, fan_in_fan_out=False)
    with pytest.raises(BadSchema, match="square") as caught:
        deltas(base, folder)
    assert caught.value.reason is Reason.WRONG_SHAPE
