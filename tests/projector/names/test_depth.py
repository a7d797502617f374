"""How deep a tensor lies, as its name tells, in the names of families that people merge."""

from collections.abc import Mapping, Sequence

import pytest

from projector.names.depth import depths, layers

FAMILIES: Mapping[str, tuple[str, str, int, str]] = {
    # what the list is called, the rest of a tensor's name in it, its last number, and a tensor that lies in none
    "bert": ("bert.encoder.layer", ".{}.attention.self.query.weight", 11, "bert.pooler.dense.bias"),
    "llama": ("model.layers", ".{}.self_attn.q_proj.weight", 31, "model.norm.weight"),
    "gpt2": ("transformer.h", ".{}.attn.c_attn.weight", 11, "transformer.wte.weight"),
    "clip": ("vision_model.encoder.layers", ".{}.mlp.fc1.weight", 23, "logit_scale"),
    "open_clip": ("visual.transformer.resblocks", ".{}.ln_1.weight", 11, "visual.conv1.weight"),
    "t5": ("decoder.block", ".{}.layer.2.DenseReluDense.wi_0.weight", 5, "decoder.final_layer_norm.weight"),
    "vit": ("vit.encoder.layer", ".{}.layernorm_before.weight", 11, "vit.embeddings.cls_token"),
    "torchvision's vit": ("encoder.layers.encoder_layer", "_{}.mlp.0.weight", 11, "conv_proj.bias"),
    "a mixture": ("model.layers", ".{}.mlp.experts.63.w1.weight", 15, "model.embed_tokens.weight"),
    "in a pipeline": ("0.auto_model.encoder.layer", ".{}.output.dense.weight", 5, "0.auto_model.pooler.dense.weight"),
    "plain": ("", "{}.weight", 4, "scale"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_families_layers_are_found(family: str) -> None:
    name, rest, last, apart = FAMILIES[family]
    pattern = name + rest
    names = [apart, *(pattern.format(number) for number in range(last + 1))]
    (found,) = layers(names)
    assert (found.name, found.first, found.last, len(found.tensors)) == (name, 0, last, last + 1)
    shares = depths(reversed(names))
    assert shares == {pattern.format(number): number / last for number in range(last + 1)}, "and nothing else"


def test_two_towers_are_two_lists_and_what_lies_in_several_is_of_the_outermost() -> None:
    vision = [f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(24)]
    text = [f"text_model.encoder.layers.{i}.mlp.{j}.weight" for i in range(12) for j in (0, 2)]
    found = depths([*vision, *text])
    assert found["vision_model.encoder.layers.23.mlp.fc1.weight"] == 1
    assert found["text_model.encoder.layers.11.mlp.0.weight"] == found["text_model.encoder.layers.11.mlp.2.weight"] == 1
    assert found["vision_model.encoder.layers.12.mlp.fc1.weight"] == 12 / 23
    assert found["text_model.encoder.layers.6.mlp.0.weight"] == 6 / 11


def test_a_lists_first_number_may_be_another_than_0_and_stages_are_a_list() -> None:
    stages = [f"layer{i}.{j}.conv{k}.weight" for i in range(1, 5) for j in (0, 1) for k in (1, 2)]
    names = ["conv1.weight", "bn1.weight", *stages]
    found = depths(names)
    assert {name: share for name, share in found.items() if "layer3" in name} == {
        f"layer3.{j}.conv{k}.weight": 2 / 3 for j in (0, 1) for k in (1, 2)
    }
    assert found["layer1.1.conv2.weight"] == 0 and found["layer4.0.conv1.weight"] == 1
    assert "conv1.weight" not in found


@pytest.mark.parametrize(
    "names",
    [
        ["layers.0.w", "layers.0.b"],  # a single layer is neither the first nor the last
        ["layers.0.experts.0.w", "layers.0.experts.1.w"],  # and experts stand beside each other
        ["ln_1.weight", "ln_2.weight", "fc1.bias", "fc2.bias", "norm2.weight"],
        ["a..b", "", ".", "x.\u0663.w", "x.4.w"],
    ],
)
def test_no_list_no_depth(names: Sequence[str]) -> None:
    assert depths(names) == {}


def test_a_pipelines_other_parts_are_told_by_its_number_where_they_have_no_layers_of_their_own() -> None:
    found = depths(["0.model.h.0.w", "0.model.h.1.w", "0.model.h.2.w", "2.linear.weight"])
    assert found == {"0.model.h.0.w": 0, "0.model.h.1.w": 0.5, "0.model.h.2.w": 1, "2.linear.weight": 1}
