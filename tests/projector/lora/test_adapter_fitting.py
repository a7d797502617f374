"""What an adapter's names need to become the base's: taken where it is unambiguous, left alone where it is not."""

import json
import re
from collections.abc import Mapping

import pytest
import torch

from daemon.checkpoints.adapter_modules import has_output, is_tied
from projector.errors import BadSchema
from projector.lora.adapter_fitting import fitted_adapter
from projector.lora.keys import tensor_parts
from projector.names.naming import Naming
from projector.spec import Schema, TensorSpec

LENIENT = Naming(lenient=True)
Shape = tuple[int, ...]


def schema(shapes: Mapping[str, Shape]) -> Schema:
    return {name: TensorSpec(name, shape, torch.float32) for name, shape in shapes.items()}


def body(prefix: str, count: int = 2) -> dict[str, Shape]:
    return {f"{prefix}layers.{n}.{part}.weight": (4, 6) for n in range(count) for part in ("q", "v")}


BASE = body("model.") | {"model.embed_tokens.weight": (30, 6), "model.norm.weight": (6,)}


def lora(modules: Mapping[str, Shape], whole: Mapping[str, Shape] | None = None) -> Schema:
    found: dict[str, Shape] = {}
    for name, (m, n) in modules.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        found |= {f"{module}.lora_A.weight": (2, n), f"{module}.lora_B.weight": (m, 2)}
    return schema(found | {f"base_model.model.{name}": shape for name, shape in (whole or {}).items()})


@pytest.mark.parametrize(
    ("base", "adapter", "noted"),
    [
        (BASE, lora(body("layers"[:0])), {"prefixes": {"": "model."}}),
        (BASE, lora({"layers.1.q.weight": (4, 6)}), {"prefixes": {"": "model."}}),
        (body(""), lora(body("model.")), {"prefixes": {"model.": ""}}),
        (BASE, lora(body("model."), {"score.weight": (2, 6)}), {"ignore": ["score.*"]}),
        (
            BASE,
            lora(body(""), {"classifier.dense.weight": (6, 6), "classifier.out.bias": (3,)}),
            {"prefixes": {"": "model."}, "ignore": ["classifier.*"]},
        ),
        (
            body("language_model.model.") | {f"vision_tower.{name}": (4, 6) for name in body("encoder.")},
            lora(body("model.language_model.")),
            {
                "prefixes": {
                    "model.language_model.": "language_model.model.",
                    "model.vision_tower.": "vision_tower.",
                    "model.multi_modal_projector.": "multi_modal_projector.",
                    "lm_head.": "language_model.lm_head.",
                }
            },
        ),
    ],
)
def test_what_is_unambiguous_is_made_to_fit(base: dict[str, Shape], adapter: Schema, noted: dict[str, object]) -> None:
    found = fitted_adapter(LENIENT, adapter, schema(base), tied=True)
    assert found.noted() == {"prefixes": {}, "ignore": []} | noted
    assert set(found.resolve(tensor_parts(adapter), base).values()) <= base.keys()
    assert fitted_adapter(Naming(), adapter, schema(base), tied=True) == Naming()


@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (BASE, lora(body("model."))),
        (body("text.") | body("sight."), lora(body(""))),  # either tower
        (BASE, lora(body("", 3))),  # of more layers
        (BASE, lora({"layers.0.q.weight": (5, 6)})),  # of another shape
        (BASE, lora({"model.layers.7.q.weight": (4, 6)})),  # no other layer
        (BASE, lora(body("model.") | {"score.weight": (2, 6)})),  # factors: no head that was saved whole
        (BASE, lora(body("model."), {"lm_head.weight": (30, 6)})),  # the embedding, or an output layer tied to it
        (BASE, lora(body("model."), {"model.layers.0.extra.weight": (2, 6)})),
        (BASE, lora(body("model."), {"prompt_encoder.weight": (2, 6)})),
        (BASE, lora({}, {"score.weight": (2, 6)})),
    ],
)
def test_what_is_ambiguous_or_no_head_is_left_alone(base: dict[str, Shape], adapter: Schema) -> None:
    assert fitted_adapter(LENIENT, adapter, schema(base), tied=True) == LENIENT


def test_a_head_that_was_saved_whole_is_the_bases_or_refused() -> None:
    base = schema(BASE | {"lm_head.weight": (30, 6), "classifier.weight": (3, 6)})
    adapter = lora(body("net.backbone."), {"net.lm_head.weight": (30, 6), "net.score.weight": (5, 6)})
    found = fitted_adapter(LENIENT, adapter, base, tied=False)
    assert found.prefixes == {"net.backbone.": "model.", "net.lm_head": "lm_head"}
    assert found.ignore == ("net.score.*",)
    other = lora(body("model."), {"head.weight": (3, 6)})
    with pytest.raises(BadSchema, match=r"head.weight .* could be classifier.weight") as refused:
        fitted_adapter(LENIENT, other, base, tied=False)
    same, own = (json.loads(said) for said in re.findall(r"that says (\{.*?\]?\})(?=;|$)", refused.value.hint))
    for said, wanted in ((same, {"classifier.weight"}), (own, set())):
        found = fitted_adapter(Naming(**said, lenient=True), other, base, tied=False)
        resolved = set(found.resolve(tensor_parts(other), base).values())
        assert resolved <= base.keys() and resolved & {"classifier.weight"} == wanted


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, True),
        ({"tie_word_embeddings": False}, False),
        ({"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}}, False),
        ({"text_config": {"tie_word_embeddings": False}}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
    ],
)
def test_a_model_that_says_so_at_any_level_is_tied(config: dict[str, object], tied: bool) -> None:
    base = schema({"model.text_model.embed_tokens.weight": (30, 6), "model.vision_model.norm.weight": (6,)})
    known = {"architectures": ["SmolVLMForConditionalGeneration"], **config}
    assert is_tied(base["model.text_model.embed_tokens.weight"], base, known) is tied


@pytest.mark.parametrize(
    ("architecture", "output"),
    [
        ("BertModel", False),
        ("LlamaForSequenceClassification", False),
        ("BertForQuestionAnswering", False),
        ("ElectraForPreTraining", False),
        ("LlamaForCausalLM", True),
        ("GPT2LMHeadModel", True),
        ("EncoderDecoderModel", True),
        ("Qwen2VLForConditionalGeneration", True),
        ("SomebodysOwn", True),
        (None, True),
    ],
)
def test_an_output_layer_is_there_unless_the_architecture_has_none(architecture: str | None, output: bool) -> None:
    assert has_output({"architectures": [architecture]} if architecture else {}) is output
