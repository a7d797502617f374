"""What an expert's names need to become the base's: taken where it is unambiguous, refused where it is not."""

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from projector.errors import BadSchema, Reason
from projector.files.source import Checkpoint
from projector.matching.fitting import fitted
from projector.matching.matching import matched
from projector.names.naming import Naming
from projector.spec import Schema, TensorSpec, check_schema
from tests.projector.conftest import Opens

LENIENT = Naming(lenient=True)
Shape = tuple[int, ...]


class Headers(Checkpoint):
    """A checkpoint of which only the header is asked for."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        super().__init__([])
        self._schema: Schema = {name: TensorSpec(name, shape, torch.float32) for name, shape in shapes.items()}

    def twins(self) -> Mapping[str, Sequence[str]]:
        return {}


def layers(count: int, prefix: str = "", norm: tuple[str, str] = ("weight", "bias")) -> dict[str, Shape]:
    """The encoder of a small BERT, bare."""
    found: dict[str, Shape] = {"embeddings.word_embeddings.weight": (30, 4), "embeddings.token_type.weight": (2, 4)}
    found |= {f"embeddings.LayerNorm.{name}": (4,) for name in norm}
    for n in range(count):
        found[f"encoder.layer.{n}.query.weight"] = (4, 4)
        found |= {f"encoder.layer.{n}.LayerNorm.{name}": (4,) for name in norm}
    return {prefix + name: shape for name, shape in found.items()}


POOLER = {"pooler.dense.weight": (4, 4), "pooler.dense.bias": (4,)}
CLS = {"cls.predictions.bias": (30,), "cls.predictions.transform.dense.weight": (4, 4)}
CLASSIFIER = {"classifier.weight": (2, 4), "classifier.bias": (2,)}  # as many labels as there are token types


def under(prefix: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {prefix + name: shape for name, shape in shapes.items()}


def fit(
    expert: Mapping[str, Shape], base: Mapping[str, Shape], naming: Naming = LENIENT, *, tied: bool = True
) -> Naming:
    return fitted(naming, Headers(expert), Headers(base), tied=tied)


def fits(naming: Naming, expert: Iterable[str], base: Iterable[str]) -> bool:
    """True where each of the base's tensors is found, or may be lacked, and nothing else is left."""
    there = set(base)
    made = set(naming.resolve(expert, there).values())
    return made <= there and all(naming.lacks(name) for name in there - made)


BARE = layers(2)


@pytest.mark.parametrize(
    ("base", "expert", "noted"),
    [
        (BARE, under("module.", BARE), {"parts": {"module": ""}}),
        (BARE, under("bert.", BARE), {"prefixes": {"bert.": ""}}),
        (BARE, under("0.auto_model.", BARE), {"prefixes": {"0.auto_model.": ""}}),
        (under("bert.", BARE), BARE, {"prefixes": {"": "bert."}}),
        (under("bert.", BARE), under("model.roberta.", BARE), {"prefixes": {"model.roberta.": "bert."}}),
        (under("module.", BARE), BARE, {"prefixes": {"": "module."}}),
        (
            BARE,
            under("module._orig_mod.bert.", BARE),
            {"parts": {"module": "", "_orig_mod": ""}, "prefixes": {"bert.": ""}},
        ),
        (
            BARE,
            under("bert.", BARE) | CLASSIFIER,
            {"prefixes": {"bert.": ""}, "ignore": ["classifier.*"]},
        ),
        (
            BARE | POOLER,
            under("bert.", BARE) | CLASSIFIER,
            {"prefixes": {"bert.": ""}, "ignore": ["classifier.*"], "unchanged": ["pooler.*"]},
        ),
        (
            under("bert.", BARE) | CLS,
            under("bert.", BARE | POOLER) | CLASSIFIER,
            {"ignore": ["bert.pooler.*", "classifier.*"], "unchanged": ["cls.*"]},
        ),
        (under("bert.", BARE) | CLS, BARE, {"prefixes": {"": "bert."}, "unchanged": ["cls.*"]}),
        (under("bert.", BARE | POOLER) | CLS, under("bert.", BARE) | CLS, {"unchanged": ["bert.pooler.*"]}),
        (layers(2, norm=("gamma", "beta")), BARE, {"parts": {"weight": "gamma", "bias": "beta"}}),
        (BARE, layers(2, norm=("gamma", "beta")), {"parts": {"gamma": "weight", "beta": "bias"}}),
        (
            layers(2, "bert.", ("gamma", "beta")),
            under("module.", BARE),
            {"parts": {"module": "", "weight": "gamma", "bias": "beta"}, "prefixes": {"": "bert."}},
        ),
        (BARE, BARE | {"heads.0.weight": (3, 4), "heads.1.weight": (7, 4)}, {"ignore": ["heads.*"]}),
        (
            BARE,
            BARE | {"qa_outputs.weight": (5, 4), "seq[0].weight": (3, 4)},
            {"ignore": ["qa_outputs.*", "seq[[]0].*"]},
        ),
    ],
)
def test_what_is_unambiguous_is_made_to_fit(
    base: dict[str, Shape], expert: dict[str, Shape], noted: dict[str, object]
) -> None:
    found = fit(expert, base)
    assert found.noted() == {"prefixes": {}, "ignore": []} | noted
    assert fits(found, expert, base)
    assert Naming(**found.noted()).resolve(expert, base) == found.resolve(expert, base)


def decoder(prefix: str = "model.", count: int = 2, rows: int = 30) -> dict[str, Shape]:
    """The body of a small Llama."""
    found: dict[str, Shape] = {"embed_tokens.weight": (rows, 4), "norm.weight": (4,)}
    found |= {f"layers.{n}.q.weight": (4, 4) for n in range(count)}
    return {prefix + name: shape for name, shape in found.items()}


OUTPUT: dict[str, Shape] = {"lm_head.weight": (30, 4)}
LLAMA = decoder() | OUTPUT
MLM = {f"cls.predictions.{name}": shape for name, shape in (("bias", (30,)), ("dense.weight", (4, 4)))}
MLM |= {"cls.predictions.LayerNorm.weight": (4,), "cls.predictions.dense.bias": (4,)}
NSP: dict[str, Shape] = {"cls.seq_relationship.weight": (2, 4), "cls.seq_relationship.bias": (2,)}
BERT = under("bert.", BARE | POOLER) | MLM | NSP
VIT = under("vit.", BARE) | {"classifier.weight": (3, 4), "classifier.bias": (3,)}
NET = {"net.backbone.": "model.", "net.lm_head": "lm_head"}


@pytest.mark.parametrize(
    ("expert", "base", "prefixes"),
    [
        (decoder("net.backbone.") | under("net.", OUTPUT), LLAMA, NET),
        (under("module.", decoder("net.backbone.") | under("net.", OUTPUT)), LLAMA, NET),
        (decoder("net.") | under("net.", OUTPUT), LLAMA, {"net.": "model.", "net.lm_head": "lm_head"}),
        (
            decoder("backbone.") | under("backbone.", OUTPUT),
            LLAMA,
            {"backbone.": "model.", "backbone.lm_head": "lm_head"},
        ),
        (LLAMA, decoder("net.backbone.") | under("net.", OUTPUT), {ours: theirs for theirs, ours in NET.items()}),
        (decoder("net.backbone.", rows=32) | {"net.lm_head.weight": (32, 4)}, LLAMA, NET),  # tokens were added
        (
            under("net.backbone.", BARE | POOLER) | under("net.", MLM | NSP),
            BERT,
            {"net.backbone.": "bert.", "net.cls": "cls"},
        ),
        (
            under("net.backbone.", BARE) | under("net.", CLASSIFIER),
            under("vit.", BARE) | CLASSIFIER,
            {"net.backbone.": "vit.", "net.classifier": "classifier"},
        ),
        (
            under("net.backbone.", BARE) | under("net.", MLM),
            layers(2, "bert.", ("gamma", "beta"))
            | {name.replace("LayerNorm.weight", "LayerNorm.gamma"): shape for name, shape in MLM.items()},
            {"net.backbone.": "bert.", "net.cls": "cls"},
        ),
    ],
)
def test_a_head_with_another_prefix_than_the_body_is_the_bases(
    expert: dict[str, Shape], base: dict[str, Shape], prefixes: dict[str, str]
) -> None:
    found = fit(expert, base)
    assert found.prefixes == prefixes and not found.ignore and not found.unchanged
    assert found.resolve(expert, base).keys() == expert.keys() and fits(found, expert, base)


COULD_BE: list[tuple[dict[str, Shape], dict[str, Shape]]] = [
    (decoder("backbone.") | {"head.weight": (30, 4)}, LLAMA),
    (decoder() | {"head.weight": (30, 4)}, LLAMA),
    (under("module.", decoder() | {"head.weight": (30, 4)}), LLAMA),
    (decoder("backbone.", rows=32) | {"head.weight": (32, 4)}, LLAMA),
    (under("net.backbone.", BARE) | {"net.head.weight": (3, 4), "net.head.bias": (3,)}, VIT),
    (
        under("net.backbone.", BARE | POOLER)
        | {name.replace("cls.predictions", "mlm"): shape for name, shape in MLM.items()}
        | {name.replace("cls.seq_relationship", "nsp"): shape for name, shape in NSP.items()},
        BERT,
    ),
    (under("bert.", BARE) | {"pooling.dense.weight": (4, 4), "pooling.dense.bias": (4,)}, BARE | POOLER),
]


@pytest.mark.parametrize(("expert", "base"), COULD_BE)
def test_a_head_that_could_be_the_bases_is_refused_until_somebody_says_which(
    expert: dict[str, Shape], base: dict[str, Shape]
) -> None:
    with pytest.raises(BadSchema, match="could be") as refused:
        fit(expert, base)
    (settings,) = re.findall(r"prefixes = \{(.*?)\} under", refused.value.hint)
    same, other = (json.loads(said) for said in re.findall(r"that says (\{.*?\]?\})(?=;|$)", refused.value.hint))
    assert same["prefixes"] == tomllib.loads(f"prefixes = {{{settings}}}")["prefixes"]
    found = fit(expert, base, Naming(**same, lenient=True))
    assert fits(found, expert, base) and not found.unchanged
    found = fit(expert, base, Naming(**other, lenient=True))
    assert fits(found, expert, base) and found.unchanged


def test_another_tasks_head_is_still_set_aside() -> None:
    """Of other classes, of another kind; and a classifier of two classes is no head for two sentences."""
    other = {"net.classifier.weight": (5, 4), "net.classifier.bias": (5,)}
    found = fit(under("net.backbone.", BARE) | other, VIT)
    assert (found.ignore, found.unchanged) == (("net.classifier.*",), ("classifier.*",))
    assert fit(decoder("net.backbone.") | {"net.score.weight": (3, 4)}, LLAMA).ignore == ("net.score.*",)
    assert fit(under("bert.", BARE | POOLER) | CLASSIFIER, BERT).unchanged == ("cls.*",)
    roberta = {"lm_head.dense.weight": (4, 4), "lm_head.dense.bias": (4,), "lm_head.bias": (30,)}
    twice = {"classifier.dense.weight": (4, 4), "classifier.dense.bias": (4,), "classifier.out_proj.weight": (2, 4)}
    assert fit(BARE | twice, BARE | roberta).unchanged == ("lm_head.*",)


def hint_of(expert: Mapping[str, Shape], base: Mapping[str, Shape], naming: Naming = LENIENT) -> str:
    """What the refusal of an expert says is to be done."""
    header = Headers(expert).schema
    with pytest.raises(BadSchema) as refused:
        resolved = fit(expert, base, naming).resolve(expert, base)
        made = {ours: replace(header[name], name=ours) for name, ours in resolved.items()}
        check_schema(Headers(base).schema, made, {ours: name for name, ours in resolved.items()})
    return refused.value.hint


def test_of_two_heads_that_could_be_it_no_hint_takes_one() -> None:
    two = decoder("net.backbone.") | under("net.", OUTPUT) | under("ref.", OUTPUT)
    assert "ignore" not in hint_of(two, LLAMA)


@pytest.mark.parametrize("naming", [LENIENT, Naming()])
def test_a_model_of_more_or_fewer_layers_is_another_model(naming: Naming) -> None:
    for prefix in ("model.", "net.model."):
        outer = prefix.removesuffix("model.")
        more = hint_of(decoder(prefix, 4) | under(outer, OUTPUT), LLAMA, naming)
        assert f"more layers than the base ({prefix}layers.2, {prefix}layers.3)" in more
        assert "ignore" not in more and "prefixes" not in more
    fewer = hint_of(decoder(count=1) | OUTPUT, LLAMA, naming)
    assert "without model.layers.1" in fewer and "unchanged" not in fewer
    first = {name: shape for name, shape in LLAMA.items() if "layers.0" not in name}
    assert '{"unchanged": ["model.layers.0.*"]}' in hint_of(first, LLAMA, naming)  # maybe frozen, and not saved


REFUSED: list[tuple[dict[str, Shape], dict[str, Shape]]] = [
    (BARE, under("bert.", layers(3))),  # more layers than the base has: another model
    (BARE, layers(3)),
    (BARE, BARE | {"encoder.layer.0.adapter.weight": (4, 4)}),
    (BARE, BARE | {"encoder.layer.0.query.bias": (4,)}),
    (BARE, BARE | {"embeddings.projection.weight": (9, 4)}),  # within the body
    (BARE, BARE | {"embedding_projection.weight": (9, 4)}),
    (BARE, BARE | {"prompt_encoder.weight": (9, 4)}),
    (BARE, BARE | {"norm.weight": (4,)}),
    (BARE, BARE | {"classifier.lora_A.weight": (9, 4)}),
    (BARE, BARE | {"mask": (9, 4)}),
    (BARE, BARE | {"average.layer.0.query.weight": (4, 4)}),  # a part of the body, once more
    (under("bert.", BARE), under("bert.", BARE) | {"average.encoder.layer.0.query.weight": (4, 4)}),
    (BARE, BARE | {f"head_{n}.weight": (3, 4) for n in range(100)}),
    (BARE, BARE | {"lm_head.weight": (30, 4)}),  # the embedding's shape: an output layer that was untied
    (layers(3), under("bert.", BARE)),  # fewer layers
    (BARE | {"norm.weight": (4,)}, under("bert.", BARE)),
    (BARE | {"lm_head.weight": (30, 4)}, BARE),  # nothing stands in its place: it may have been lost
    (BARE | CLASSIFIER, BARE),
    (BARE | CLASSIFIER, BARE | {"classifier.weight": (2, 4)} | POOLER),  # half a head
    (BARE, {}),
    (BARE, {"a.weight": (4,)}),
]


@pytest.mark.parametrize(("base", "expert"), REFUSED)
def test_what_is_no_head_is_not_set_aside(base: dict[str, Shape], expert: dict[str, Shape]) -> None:
    assert not fits(fit(expert, base), expert, base)


@pytest.mark.parametrize(("base", "expert"), REFUSED)
def test_what_the_refusals_hint_says_makes_it_fit(base: dict[str, Shape], expert: dict[str, Shape]) -> None:
    """Where there is one: an untied output layer has none, nor have more layers, nor what lacks everything."""
    header = Headers(expert).schema
    resolved = fit(expert, base).resolve(expert, base)
    with pytest.raises(BadSchema) as refused:
        made = {ours: replace(header[name], name=ours) for name, ours in resolved.items()}
        check_schema(Headers(base).schema, made, {ours: name for name, ours in resolved.items()})
    if found := re.search(r"that says (\{.*?\]?\})", refused.value.hint):
        said = Naming(**json.loads(found[1]), lenient=True)
        assert fits(fit(expert, base, said), expert, base)
    else:
        assert refused.value.reason is not Reason.UNEXPECTED_TENSOR or re.search("tied|more layers", refused.value.hint)


def test_an_output_layer_is_a_head_over_a_base_that_has_none() -> None:
    expert = under("model.", BARE) | {"lm_head.weight": (30, 4)}
    assert fit(expert, BARE, tied=False).noted() == {"prefixes": {"model.": ""}, "ignore": ["lm_head.*"]}
    assert fits(fit(BARE | CLASSIFIER, BARE | CLS), BARE | CLASSIFIER, BARE | CLS)


@pytest.mark.parametrize(
    ("expert", "base", "named"),
    [
        (under("encoder.", BARE) | under("decoder.", BARE), BARE, "decoder.*, encoder.*"),
        (BARE | under("ema.", BARE), BARE, "*, ema.*"),
        (BARE | under("_orig_mod.", BARE), BARE, "*, *_orig_mod.*"),
        (under("student.bert.", BARE) | under("teacher.", BARE), under("bert.", BARE), "student.*, teacher.*"),
    ],
)
def test_a_model_that_is_there_twice_is_refused_until_somebody_says_which(
    expert: dict[str, Shape], base: dict[str, Shape], named: str
) -> None:
    with pytest.raises(BadSchema, match=re.escape(f"2 times: {named}")) as refused:
        fit(expert, base)
    assert refused.value.reason is Reason.UNEXPECTED_TENSOR
    globs = re.findall(r'"([^"]*\*)"', refused.value.hint)
    assert fits(fit(expert, base, Naming(ignore=globs, lenient=True)), expert, base)


def test_of_two_that_have_the_names_the_one_with_the_shapes_counts() -> None:
    narrow = {name: tuple(2 if side == 4 else side for side in shape) for name, shape in BARE.items()}
    expert = under("text_model.", BARE) | under("vision_model.", narrow)
    assert fit(expert, BARE).prefixes == {"text_model.": ""}


def test_a_vocabulary_of_another_size_is_told_of_under_its_prefix() -> None:
    expert = under("bert.", BARE | {"embeddings.word_embeddings.weight": (31, 4)})
    assert fit(expert, BARE).prefixes == {"bert.": ""}
    part = under("bert.", {name: shape for name, shape in BARE.items() if "1" not in name})
    assert fit(part, BARE).prefixes == {"bert.": ""}  # and so is what is missing


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (
            ["model.language_model.layers.0.q.weight", "model.vision_tower.layers.0.q.weight", "lm_head.weight"],
            [
                "language_model.model.layers.0.q.weight",
                "vision_tower.layers.0.q.weight",
                "language_model.lm_head.weight",
            ],
        ),
        (
            ["model.language_model.layers.0.q.weight", "model.visual.blocks.0.q.weight"],
            ["model.layers.0.q.weight", "visual.blocks.0.q.weight"],
        ),
    ],
)
@pytest.mark.parametrize("wrapped", ["", "module."])
def test_models_whose_parts_the_library_renamed(one: list[str], other: list[str], wrapped: str) -> None:
    for expert, base in ((one, other), (other, one)):
        theirs = [wrapped + name for name in expert]
        naming = fit(dict.fromkeys(theirs, (4, 4)), dict.fromkeys(base, (4, 4)))
        assert naming.resolve(theirs, base) == dict(zip(theirs, base, strict=True))


def test_the_settings_come_first_and_may_turn_it_off() -> None:
    expert = under("bert.", BARE) | CLASSIFIER
    strict = Naming({"bert.": ""})
    assert fit(expert, BARE, strict) is strict
    lenient = Naming({"bert.": ""}, ["nothing"], lenient=True)
    assert fit(expert, BARE, lenient).noted() == {"prefixes": {"bert.": ""}, "ignore": ["nothing", "classifier.*"]}


def test_quantised_weights_are_no_head() -> None:
    with pytest.raises(BadSchema, match="GPTQ"):
        fit(BARE | {"classifier.scales": (2, 4)}, BARE)


def test_its_time_grows_with_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted are the looks at names, over bases of two sizes and the worst names: copies of all but a tensor."""
    counted = 0
    plain: Callable[..., object] = Naming.tried

    def tried(self: Naming, name: str) -> object:
        nonlocal counted
        counted += 1
        return plain(self, name)

    monkeypatch.setattr(Naming, "tried", tried)
    counts = []
    for size in (50, 500):
        base = layers(size)
        part = dict(list(base.items())[:-1])
        expert = {name: shape for n in range(20) for name, shape in under(f"copy{n}.", part).items()}
        counted = 0
        fit(expert, base)
        counts.append(counted / len(expert))
    assert counts[1] <= counts[0] * 1.1


def test_a_tensor_that_is_the_bases_has_no_delta_and_its_sidecars_are_zero(opens: Opens) -> None:
    def matrix(seed: int, *shape: int) -> Tensor:
        return torch.randn(*(shape or (8, 4)), generator=torch.Generator().manual_seed(seed))

    base = opens({"a.weight": matrix(1), "pooler.weight": matrix(2)})
    fisher, gram = {"a.weight": matrix(5)}, {"a": matrix(6, 4, 4)}
    expert = opens({"m.a.weight": matrix(3), "m.head.weight": matrix(4, 3, 4)}, fisher=fisher, gram=gram)
    naming = fitted(LENIENT, expert, base, tied=True)
    found = matched(base, expert, naming)
    spec = found.schema["pooler.weight"]
    (fetched,) = found.fetch(spec, slice(1, 3))
    assert not found.delta(spec, base.read("pooler.weight", slice(1, 3)), [fetched]).any()
    beside = found.sidecars(spec, slice(1, 3))
    assert {kind: values.shape for kind, values in beside.items()} == {"fisher": (2, 4), "gram": (4, 4)}
    assert not any(values.any() for values in beside.values())
    whole = opens({"a.weight": matrix(3), "pooler.weight": matrix(2)})
    assert found.content() == matched(base, whole, Naming()).content()  # what it leaves alone, another may bring


def test_a_second_body_is_no_head() -> None:
    """A vision tower over a text model, by whatever name: what it learnt would be left out."""
    text = {f"model.{name}": shape for name, shape in layers(2).items()} | {"lm_head.weight": (30, 4)}
    for tower in ("visual.blocks.0.attn.weight", "mine.blocks.0.weight", "mm_projector.weight", "resampler.weight"):
        naming = fitted(LENIENT, Headers({**text, tower: (3, 5)}), Headers(text), tied=True)
        assert not naming.ignore, tower


ATTENTION = {
    f"decoder.mid.{name}.{part}.weight": (4, 4) for name in ("attn_1", "cross_attn") for part in ("q", "proj_out")
}


@pytest.mark.parametrize("name", ["decoder.mid.attn_1.proj_out.weight", "decoder.mid.cross_attn.proj_out.weight"])
def test_what_an_attention_ends_in_is_no_head(name: str) -> None:
    """It has the name of Whisper's."""
    base = BARE | ATTENTION
    without = {other: shape for other, shape in base.items() if other != name}
    assert fit(without | CLASSIFIER, base).noted() == {"prefixes": {}, "ignore": ["classifier.*"]}  # so it is missing
    assert fit(base, without).noted() == {"prefixes": {}, "ignore": []}  # so it is one too many
    whisper = {"proj_out.weight": (30, 4)}
    assert fit(BARE | CLASSIFIER, BARE | whisper).unchanged == ("proj_out.*",)
