"""Names, tied weights, dtypes and buffers over real homes: what is taken, what is refused, what its hint is worth."""

import json
import os
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from daemon.config import load
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.reports.compare import compare, find_published
from daemon.reports.inspect import inspect
from projector.errors import BadSchema
from registry.records import Expert, Status
from tests.daemon.homes import Heads, assert_close, drain, experts, latest, lineage, make_home, quick
from tests.daemon.processes import forked
from tests.models import read_weights
from tests.oracles.rules import mean

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported

MEAN: Heads = (("main", "mean", {}),)
STRICT = "[admission]\nlenient_names = false\n"
EMBED, UP = "embed_tokens.weight", "layers.0.up.weight"
Weights = dict[str, Tensor]

needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")


@pytest.fixture
def home(tmp_path: Path, base: Path) -> Home:
    return make_home(tmp_path / "home", base, MEAN)


def moved(weights: Mapping[str, Tensor], seed: int) -> Weights:
    """What fine-tuning could have made of these weights; tensors with the same values stay the same."""

    def step(tensor: Tensor) -> Tensor:
        draw = torch.Generator().manual_seed(seed + tensor.numel())
        return tensor + 0.01 * torch.randn(tensor.shape, generator=draw, dtype=torch.float64).to(tensor.dtype)

    return {name: step(tensor) if tensor.is_floating_point() else tensor.clone() for name, tensor in weights.items()}


def drop(home: Home, weights: Weights, name: str = "x.safetensors") -> Expert:
    """Drops an expert under the settings of mainstem.toml; what became of it."""
    save_file({key: tensor.contiguous() for key, tensor in weights.items()}, home.inbox / name)
    admission = load(home.config).admission.model_dump()
    drain(home, quick(admission=admission))
    return experts(home)[-1]


def follow(home: Home, expert: Expert) -> None:
    """Does what the hint says."""
    assert expert.hint
    found = re.search(r"put (.*) under \[admission\] in mainstem\.toml", expert.hint)
    assert found, expert.hint
    home.config.write_text(STRICT + found[1].replace(" and ignore", "\nignore") + "\n")


def test_factors_that_the_settings_leave_out_are_no_matter(home: Home) -> None:
    """A whole model beside what was once its adapter's: refused as an adapter, until they are ignored by name."""
    weights = moved(read_weights(home.base), 1) | {"old.lora_A.weight": torch.ones(2, 3)}
    refused = drop(home, weights)
    assert refused.reason == "adapter" and "old.lora_A.weight" in (refused.detail or "")
    home.config.write_text('[admission]\nignore = ["old.*"]\n')
    assert drop(home, weights, "y.safetensors").status is Status.MERGED


@pytest.mark.parametrize(
    ("rename", "extra"),
    [
        (lambda name: f"module.{name}", {}),
        (lambda name: f"model.encoder.{name}", {"model.head.weight": torch.ones(2, 2), "score.bias": torch.ones(2)}),
        (lambda name: name.removeprefix("layers."), {}),
        (lambda name: name, {"classifier.weight": torch.ones(2, 2), "layers.0.extra.bias": torch.ones(3)}),
    ],
)
def test_the_hint_says_the_setting_that_mends_the_names(
    tmp_path: Path, rename: Callable[[str], str], extra: Weights
) -> None:
    base = {name: torch.randn(4, 4) for name in ("layers.0.up.weight", "layers.1.up.weight")}
    save_file(base, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)
    home.config.write_text(STRICT)
    expert = moved(base, seed=1)
    theirs = {rename(name): tensor for name, tensor in expert.items()} | extra

    refused = drop(home, theirs)
    assert refused.status is Status.QUARANTINED
    follow(home, refused)
    merged = drop(home, theirs)
    assert merged.status is Status.MERGED, merged.detail
    assert_close(latest(home), mean(base, [expert]))


def test_an_expert_with_a_prefix_is_read_the_same_by_every_command(home: Home, base: Path, tmp_path: Path) -> None:
    weights = read_weights(base)
    first, second = moved(weights, seed=1), moved(weights, seed=2)
    home.config.write_text('[admission]\nprefixes = {"m." = ""}\nignore = ["head.*"]\n')
    theirs = {f"m.{name}": tensor for name, tensor in first.items()} | {"head.weight": torch.zeros(3)}
    save_file(theirs, tmp_path / "dry.safetensors")
    with lineage(home) as reader:
        assert inspect(home, reader, tmp_path / "dry.safetensors", None)["norm"] > 0
    assert drop(home, theirs, "first.safetensors").version == 1
    assert drop(home, second, "second.safetensors").version == 2
    assert_close(latest(home), mean(weights, [first, second]))

    with lineage(home) as reader:
        assert verify(home, reader, lambda _: None)[1] == []
        a, b = find_published(reader, "1"), find_published(reader, "2")
        kept = compare(home, reader, a, b, experts=True)["experts"]
    assert kept[0]["a_kept"] == pytest.approx(1, abs=1e-4)

    assert forked("rebuild", "--home", home.root, "--into", tmp_path / "again", "--method", "mean").returncode == 0
    assert_close(latest(Home(tmp_path / "again")), mean(weights, [first, second]))
    assert forked("rebuild", "--home", home.root, "--without", "second.safetensors").returncode == 0
    assert_close(latest(home), mean(weights, [first]))


def test_a_sidecar_is_named_as_the_weights_are(tmp_path: Path, base: Path) -> None:
    home = make_home(tmp_path / "home", base, (("main", "fisher", {}),))
    weights = read_weights(base)
    expert = moved(weights, seed=1)
    for name, prefix in (("plain", ""), ("prefixed", "m.")):
        folder = home.inbox / name
        folder.mkdir()
        fisher = {key: torch.rand_like(tensor) for key, tensor in expert.items() if tensor.is_floating_point()}
        save_file({prefix + key: tensor for key, tensor in fisher.items()}, folder / "fisher.safetensors")
        expert[UP] += 1e-3  # lest the second is the first again
        theirs = {prefix + key: tensor for key, tensor in expert.items()}
        save_file(theirs | ({"m.head": torch.ones(2)} if prefix else {}), folder / "model.safetensors")
    drain(home, quick(admission={"prefixes": {"m.": ""}, "ignore": ["m.head"]}))
    assert [(one.status, one.detail) for one in experts(home)] == [(Status.MERGED, None)] * 2


class TestTied:
    """One tensor under two names: "embed.weight" and, stored or not, "lm_head.weight"."""

    HEAD = "lm_head.weight"

    @staticmethod
    def model(head: bool) -> Weights:
        draw = torch.Generator().manual_seed(0)
        weights = {"embed.weight": torch.randn(10, 4, generator=draw), "up.weight": torch.randn(4, 4, generator=draw)}
        weights |= {"zero.weight": torch.zeros(4, 4), "other.weight": torch.zeros(4, 4), "up.bias": torch.ones(4)}
        weights["norm.bias"] = torch.ones(4)
        return weights | ({TestTied.HEAD: weights["embed.weight"].clone()} if head else {})

    @staticmethod
    def home(tmp_path: Path, *, head: bool) -> Home:
        save_file(TestTied.model(head), tmp_path / "base.safetensors")
        return make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)

    def test_the_expert_may_bring_an_alias_that_the_base_omits(self, tmp_path: Path) -> None:
        home = self.home(tmp_path, head=False)
        arrived = [moved(self.model(head=False), seed) for seed in (1, 2, 3)]
        narrow = {name: weight.bfloat16() for name, weight in arrived[2].items()}  # and the alias is kept wide
        heads = [arrived[0]["embed.weight"], arrived[1]["embed.weight"].double(), narrow["embed.weight"].float()]
        for n, (expert, head) in enumerate(zip((*arrived[:2], narrow), heads, strict=True)):
            assert drop(home, expert | {self.HEAD: head.clone()}, f"{n}.safetensors").detail is None
        assert_close(latest(home), mean(self.model(head=False), [*arrived[:2], narrow]))

    def test_an_alias_with_values_of_its_own_is_refused_by_name(self, tmp_path: Path) -> None:
        home = self.home(tmp_path, head=False)
        expert = moved(self.model(head=False), seed=1)
        other = expert["embed.weight"].clone()
        other[-1, -1] += 1e-6
        for head in (other, other.double(), expert["embed.weight"].half(), expert["embed.weight"].double() + 1e-9):
            refused = drop(home, expert | {self.HEAD: head})
            assert (refused.reason, refused.detail) == (
                "unexpected_tensor",
                "lm_head.weight is not the base's, and differs from the expert's own embed.weight",
            )
            assert refused.hint and "ignore" not in refused.hint and "tied" in refused.hint

    def test_an_alias_in_another_dtype_is_one_where_no_value_differs(self, tmp_path: Path) -> None:
        """As where the output layer was cast to float32 beside an embedding in bfloat16."""
        home = self.home(tmp_path, head=False)
        expert = moved(self.model(head=False), seed=1)
        assert drop(home, expert | {self.HEAD: expert["embed.weight"].double()}).detail is None
        assert_close(latest(home), mean(self.model(head=False), [expert]))

    def test_what_is_alike_by_chance_is_no_alias(self, tmp_path: Path) -> None:
        home = self.home(tmp_path, head=False)
        home.config.write_text(STRICT)
        expert = moved(self.model(head=False), seed=1)
        zeros = {"zero.weight": torch.zeros(4, 4), "head.weight": torch.zeros(4, 4)}
        assert drop(home, expert | zeros).reason == "unexpected_tensor"
        biases = {"head.bias": expert["up.bias"].clone()}
        assert drop(home, expert | biases).reason == "unexpected_tensor"

    @pytest.mark.parametrize("present", ["lm_head.weight", "embed.weight"])
    def test_the_expert_may_omit_an_alias_that_the_base_stores(self, tmp_path: Path, present: str) -> None:
        home = self.home(tmp_path, head=True)
        whole = moved(self.model(head=True), seed=1)
        assert torch.equal(whole["embed.weight"], whole[self.HEAD])
        names = {*whole} - ({"embed.weight", self.HEAD} - {present})
        assert drop(home, {name: whole[name] for name in names}).detail is None
        assert_close(latest(home), mean(self.model(head=True), [whole]))

    def test_an_expert_that_has_it_under_the_other_name_only_needs_a_prefix(self, tmp_path: Path) -> None:
        home = self.home(tmp_path, head=False)
        expert = moved(self.model(head=False), seed=1)
        other = {**expert, self.HEAD: expert["embed.weight"]}
        del other["embed.weight"]
        assert drop(home, other).reason == "missing_tensor"
        home.config.write_text('[admission]\nprefixes = {"lm_head." = "embed."}\n')
        assert drop(home, other).detail is None
        assert_close(latest(home), mean(self.model(head=False), [expert]))

    @pytest.mark.parametrize("name", ["zero.weight", "norm.bias", "up.weight"])
    def test_any_other_tensor_must_be_there(self, tmp_path: Path, name: str) -> None:
        home = self.home(tmp_path, head=True)
        expert = moved(self.model(head=True), seed=1)
        del expert[name]
        refused = drop(home, expert)
        assert (refused.reason, refused.detail) == ("missing_tensor", f"1 of the base's tensors are missing: {name}")


def test_a_vocabulary_of_another_size_is_refused_with_both(home: Home, base: Path) -> None:
    expert = moved(read_weights(base), seed=1)
    expert[EMBED] = torch.cat([expert[EMBED].roll(1, 0), torch.zeros(2, 16)])  # not the same tokens, and more
    refused = drop(home, expert)
    assert refused.reason == "wrong_shape"
    assert refused.detail == "embed_tokens.weight has shape [26, 16], the base [24, 16]"
    assert refused.hint and "with its vocabulary" in refused.hint and "resize" not in refused.hint


def test_an_output_layer_that_was_untied_is_not_offered_to_be_ignored(home: Home, base: Path) -> None:
    expert = moved(read_weights(base), seed=1)
    expert["lm_head.weight"] = expert[EMBED] + 0.01
    refused = drop(home, expert)
    assert refused.reason == "unexpected_tensor"
    assert refused.detail == f"lm_head.weight is not the base's, and differs from the expert's own {EMBED}"
    assert refused.hint and "ignore" not in refused.hint and "tied" in refused.hint


def test_whole_numbers_are_the_bases_whatever_the_expert_has(tmp_path: Path) -> None:
    base = {"w": torch.randn(4, 4), "scale": torch.tensor(2.0), "ids": torch.arange(4), "seen": torch.tensor(7)}
    base["mask"] = torch.tensor([True, False])
    save_file(base, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)
    floats = {name: tensor for name, tensor in base.items() if tensor.is_floating_point()}
    arrived = [moved(floats, seed) for seed in (1, 2, 3)]
    other = {"ids": torch.ones(4, dtype=torch.int32), "seen": torch.tensor(9), "mask": torch.tensor([False, False])}
    buffers: list[Weights] = [{}, other, {**base, "position_ids": torch.arange(9), "more.mask": torch.tensor(True)}]
    for n, (weights, beside) in enumerate(zip(arrived, buffers, strict=True)):
        assert drop(home, {**beside, **weights}, f"{n}.safetensors").detail is None
    assert_close(latest(home), mean(base, arrived))  # the oracle takes what does not float from the base
    assert latest(home)["scale"].shape == ()
    assert drop(home, {**arrived[0], "ids": torch.arange(5)}).reason == "wrong_shape"
    assert drop(home, {**arrived[0], "ids": torch.arange(4.0)}).reason == "unsupported_dtype"


def test_what_does_not_fit_into_float16_is_published_wider_as_the_hint_says(tmp_path: Path) -> None:
    base = {"w": torch.full((4, 4), 60000.0, dtype=torch.float16)}
    save_file(base, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", MEAN)
    expert = {"w": torch.full((4, 4), 70000.0)}
    refused = drop(home, expert)
    assert (refused.reason, refused.detail) == ("not_finite", "the merged w does not fit into float16")
    assert refused.hint and 'publish.dtype = "float32"' in refused.hint
    save_file(expert, home.inbox / "y.safetensors")
    drain(home, quick(publish={"dtype": "float32"}))
    assert torch.equal(latest(home)["w"], expert["w"])


@pytest.mark.parametrize(
    ("change", "named", "hint"),
    [
        ({UP: torch.zeros(32, 16, dtype=torch.float8_e4m3fn)}, f"{UP} has dtype F8_E4M3", "quantised"),
        ({UP: torch.zeros(32, 16, dtype=torch.float8_e5m2)}, f"{UP} has dtype F8_E5M2", "quantised"),
        ({UP: torch.zeros(32, 16, dtype=torch.float8_e8m0fnu)}, f"{UP} has dtype F8_E8M0", "quantised"),
        ({UP: torch.zeros(32, 8, dtype=torch.float4_e2m1fn_x2)}, f"{UP} has dtype F4", "quantised"),
        ({UP: torch.zeros(32, 16, dtype=torch.complex64)}, f"{UP} has dtype C64", "complex"),
        ({UP: torch.zeros(32, 16, dtype=torch.int8)}, f"{UP} is int8, the base float32", "quantised"),
        ({UP: torch.zeros(32, 16, dtype=torch.bool)}, f"{UP} is bool, the base float32", "float32"),
        ({UP: torch.zeros(32, 16, dtype=torch.uint16)}, f"{UP} has dtype U16", "F32"),
        ({"layers.0.up.qweight": torch.zeros(4, 32, dtype=torch.int32)}, "layers.0.up.qweight", "GPTQ"),
        ({"layers.0.up.scales": torch.zeros(1, 32, dtype=torch.float16)}, "layers.0.up.scales", "quantised"),
        ({"layers.0.up.weight_scale_inv": torch.ones(1)}, "layers.0.up.weight_scale_inv", "quantised"),
        ({"layers.0.up.weight.quant_map": torch.ones(16)}, "layers.0.up.weight.quant_map", "quantised"),
        ({"experts.gate_up_proj_blocks": torch.zeros(2, dtype=torch.uint8)}, "experts.gate_up_proj_blocks", "MXFP4"),
    ],
)
def test_odd_dtypes_and_quantised_weights_are_refused_by_name(
    home: Home, base: Path, change: Weights, named: str, hint: str
) -> None:
    refused = drop(home, moved(read_weights(base), seed=1) | change)
    assert refused.reason == "unsupported_dtype"
    assert refused.detail and named in refused.detail
    assert refused.hint and hint in refused.detail + refused.hint


@pytest.mark.parametrize(
    "more",
    [
        {"layers.0.up.qweight": torch.zeros(4, 32, dtype=torch.int32)},
        {"layers.0.q.weight": torch.zeros(4, 4, dtype=torch.int8)},
    ],
)
def test_a_quantised_base_is_refused(tmp_path: Path, base: Path, more: Weights) -> None:
    save_file(read_weights(base) | more, tmp_path / "quantised.safetensors")
    with pytest.raises(BadSchema, match=rf"the base .*{next(iter(more))}"):
        make_home(tmp_path / "home", tmp_path / "quantised.safetensors", MEAN)


@needs_transformers
@pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the library's own
@pytest.mark.parametrize("published", ["base", "float32", "float16", "bfloat16"])
def test_experts_of_any_precision_and_the_published_one_as_it_is_loaded(tmp_path: Path, published: str) -> None:
    from transformers import AutoModelForCausalLM

    from tests.daemon.checkpoints.test_architectures import llama

    llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    base = read_weights(tmp_path / "base")
    home = make_home(tmp_path / "home", tmp_path / "base", MEAN)
    arrived = []
    for n, dtype in enumerate((torch.float32, torch.float16, torch.float64, torch.bfloat16), start=1):
        arrived.append(moved({name: tensor.to(dtype) for name, tensor in base.items()}, n))
        save_file(arrived[-1], home.inbox / f"{n}.safetensors")
    drain(home, quick(publish={"dtype": published}))
    assert [one.detail for one in experts(home)] == [None] * 4

    wanted = getattr(torch, "bfloat16" if published == "base" else published)
    model = AutoModelForCausalLM.from_pretrained(home.latest("main"))
    exact = mean(base, arrived)
    error = torch.finfo(wanted).eps
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == wanted, name
        torch.testing.assert_close(tensor.double(), exact[name], rtol=error, atol=1e-6)
    config = json.loads((home.latest("main") / "config.json").read_text())
    original = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config == {**original, "dtype": str(wanted).removeprefix("torch.")}
