"""Weights keep the names that the base's files have, so that what loads the base loads every version."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from daemon.checkpoints.checkpoint import open_path
from daemon.checkpoints.weight_names import checkpoints, weight_names
from daemon.errors import NotYet, Reason
from daemon.layout import Home
from tests.daemon.homes import assert_close, drain, experts, make_home, put, quick
from tests.models import read_weights, write_base, write_expert

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["model.safetensors", "config.json"], ["model.safetensors"]),
        (["model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"], ["model.safetensors"]),
        (["model-00001-of-00002.safetensors", "model.safetensors.index.json"], ["model.safetensors.index.json"]),
        (["model.safetensors", "model.safetensors.index.json"], ["model.safetensors"]),
        (
            ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
            ["diffusion_pytorch_model.safetensors"],
        ),
        (
            [
                "diffusion_pytorch_model.safetensors.index.json",
                "diffusion_pytorch_model-00001-of-00002.safetensors",
                "diffusion_pytorch_model.safetensors.index.fp16.json",
                "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            ],
            ["diffusion_pytorch_model.safetensors.index.json"],
        ),
        (["diffusion_pytorch_model.fp16.safetensors"], ["diffusion_pytorch_model.fp16.safetensors"]),
        (
            ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
            ["model.safetensors.index.fp16.json"],
        ),
        (["flux1-dev.safetensors", "diffusion_pytorch_model.safetensors"], ["diffusion_pytorch_model.safetensors"]),
        (["open_clip_model.safetensors"], ["open_clip_model.safetensors"]),
        (["consolidated-00001-of-00001.safetensors"], ["consolidated-00001-of-00001.safetensors"]),
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["v1.5.safetensors", "v1.safetensors"], ["v1.safetensors"]),
        (["fisher.safetensors", ".model.safetensors", "model.bin"], []),
        (["model-00001-of-00002.safetensors"], []),
    ],
)
def test_which_files_are_a_folders_weights(names: Sequence[str], wanted: Sequence[str]) -> None:
    assert checkpoints(names, {"fisher.safetensors"}) == wanted
    assert checkpoints(names[::-1], {"fisher.safetensors"}) == wanted


@pytest.mark.parametrize(
    ("file", "whole", "pattern", "index"),
    [
        (
            "diffusion_pytorch_model-00002-of-00004.safetensors",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model{suffix}.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
        ),
        (
            "model.safetensors.index.fp16.json",
            "model.fp16.safetensors",
            "model.fp16{suffix}.safetensors",
            "model.safetensors.index.fp16.json",
        ),
        ("v1.5.safetensors", "v1.5.safetensors", "v1.5{suffix}.safetensors", "v1.5.safetensors.index.json"),
        ("2_Dense/model.safetensors", "model.safetensors", "model{suffix}.safetensors", "model.safetensors.index.json"),
    ],
)
def test_how_more_of_them_are_called(file: str, whole: str, pattern: str, index: str) -> None:
    """As transformers' and diffusers' save_pretrained(variant=...) write them."""
    found = weight_names(["config.json", file])
    assert (found.whole, found.pattern, found.index) == (whole, pattern, index)


def sharded(folder: Path, stem: str, index: str) -> Path:
    """The base, in two files that no rule of ours would have made, with their index."""
    tensors = read_weights(write_base(folder, 1))
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {f"{stem}-00001-of-00002.safetensors": names[:2], f"{stem}-00002-of-00002.safetensors": names[2:]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("model", "model.safetensors.index.json"),
        ("diffusion_pytorch_model.fp16", "diffusion_pytorch_model.safetensors.index.fp16.json"),
        ("pytorch_model", "model.safetensors.index.json"),
    ],
)
def test_shards_stay_as_the_base_has_them(stem: str, index: str, tmp_path: Path) -> None:
    base = sharded(tmp_path / "base", stem, index)
    home = make_home(tmp_path / "home", base)
    whole = write_base(tmp_path / "whole", 1)
    put(home, write_expert(tmp_path / "e.safetensors", whole, 2))
    drain(home)
    first, then = home.version("main", 0), home.version("main", 1)
    assert {path.name for path in first.iterdir()} == {path.name for path in then.iterdir()}
    assert json.loads((then / index).read_text())["weight_map"] == json.loads((base / index).read_text())["weight_map"]
    with open_path(then) as opened:
        assert opened.index == index
        assert {file.name: set(file.reader.specs) for file in opened.files} == {
            name: set(load_file(base / name)) for name in (f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2))
        }
    drain(home, quick(publish={"shard_bytes": 1 << 30}))
    put(home, write_expert(tmp_path / "f.safetensors", whole, 3))
    drain(home, quick(publish={"shard_bytes": 1 << 30}))
    name = weight_names([index]).whole
    assert [path.name for path in home.latest("main").glob("*.safetensors*")] == [name]


def test_a_folders_only_file_keeps_its_name_and_a_file_alone_becomes_the_usual_one(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", 1)
    (base / "model.safetensors").rename(base / "consolidated.safetensors")
    alone = shutil.copy(base / "consolidated.safetensors", tmp_path / "v1.safetensors")
    for source, name in ((base, "consolidated.safetensors"), (Path(alone), "model.safetensors")):
        home = make_home(tmp_path / f"home-{source.name}", source)
        put(home, write_expert(tmp_path / "e.safetensors", Path(alone), 2))
        drain(home)
        for number in (0, 1):
            assert [path.name for path in home.version("main", number).glob("*.safetensors")] == [name]


def test_a_home_made_before_goes_on_with_the_names_that_it_has(tmp_path: Path) -> None:
    """Whatever the base was called, it lay there as model.safetensors."""
    base = write_base(tmp_path / "base", 1)
    home = make_home(tmp_path / "home", base)
    (base / "model.safetensors").rename(base / "diffusion_pytorch_model.safetensors")
    put(home, shutil.copytree(base, tmp_path / "same"))
    put(home, write_expert(tmp_path / "e.safetensors", home.base, 2))
    drain(home)
    assert [path.name for path in home.latest("main").glob("*.safetensors")] == ["model.safetensors"]


def test_an_expert_may_come_in_any_layout_and_two_models_in_none(tmp_path: Path) -> None:
    """As diffusers saves them: in shards by its own names, and with a variant beside."""
    base = sharded(tmp_path / "base", "diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json")
    whole = write_base(tmp_path / "whole", 1)
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    variant = write_expert(tmp_path / "variant", whole, 2)
    (variant / "model.safetensors").rename(variant / "diffusion_pytorch_model.safetensors")
    half = {n: t.half() if t.is_floating_point() else t for n, t in read_weights(whole).items()}
    save_file(half, variant / "diffusion_pytorch_model.fp16.safetensors")
    wanted = load_file(variant / "diffusion_pytorch_model.safetensors")
    several = shutil.copytree(variant, tmp_path / "several")
    (several / "diffusion_pytorch_model.safetensors").rename(several / "a.safetensors")
    with pytest.raises(NotYet, match=r"several models: a\.safetensors, diffusion_pytorch_model\.fp16") as refused:
        open_path(several)
    assert refused.value.reason is Reason.NO_WEIGHTS
    (several / "diffusion_pytorch_model.fp16.safetensors").unlink()  # as the hint says
    open_path(several).close()
    put(home, variant)
    drain(home)
    assert [expert.status for expert in experts(home)] == ["merged"]
    found: dict[str, torch.Tensor] = {}
    for path in sorted(home.latest("main").glob("*.safetensors")):
        found |= load_file(path)
    assert_close(found, wanted)


def test_a_pipelines_folder_says_which_folders_hold_models(tmp_path: Path) -> None:
    """As diffusers lays it out; each part of it that is fine-tuned can be a base."""
    for part in ("vae", "unet"):
        (tmp_path / "pipeline").mkdir(exist_ok=True)
        write_base(tmp_path / "pipeline" / part, 1)
    (tmp_path / "pipeline" / "scheduler").mkdir()
    with pytest.raises(NotYet, match="its weights are in unet, vae") as refused:
        make_home(tmp_path / "home", tmp_path / "pipeline")
    assert "the folder itself" in refused.value.hint
    assert make_home(tmp_path / "home", tmp_path / "pipeline" / "unet").exists()


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bases of speech models with all that their processors are made of, each by its library's own save_pretrained."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
        Wav2Vec2Processor,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    root = tmp_path_factory.mktemp("speech")
    torch.manual_seed(0)
    (root / "vocab.json").write_text(json.dumps({"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5, "b": 6}))
    tokenizer = Wav2Vec2CTCTokenizer(str(root / "vocab.json"))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_feat_extract_layers": 1}
    ctc = Wav2Vec2Config(
        vocab_size=7, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, **sizes, **convolutions
    )
    Wav2Vec2ForCTC(ctc).save_pretrained(root / "wav2vec2")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(root / "wav2vec2")

    (root / "whisper.json").write_text(json.dumps({"<|endoftext|>": 0, "a": 1, "b": 2, "Ġ": 3, "Ġa": 4}))
    (root / "merges.txt").write_text("#version: 0.2\nĠ a\n")
    (root / "normalizer.json").write_text(json.dumps({"colour": "color"}))
    words = WhisperTokenizer(str(root / "whisper.json"), str(root / "merges.txt"), str(root / "normalizer.json"))
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    whisper = WhisperConfig(
        vocab_size=16,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        **layers,
    )
    WhisperForConditionalGeneration(whisper).save_pretrained(root / "whisper")
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8), words).save_pretrained(root / "whisper")
    return {"wav2vec2": root / "wav2vec2", "whisper": root / "whisper"}


def merged_once(root: Path, base: Path) -> Home:
    from transformers import AutoConfig

    home = make_home(root / "home", base, [("main", "mean", {})])
    (file,) = base.glob("*.safetensors")
    put(home, write_expert(root / "e.safetensors", file, 2))
    drain(home)
    assert AutoConfig.from_pretrained(home.latest("main")).architectures
    return home


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_speech_models_load_with_their_processors(name: str, speech: dict[str, Path], tmp_path: Path) -> None:
    import transformers
    from transformers import AutoConfig, AutoProcessor

    base = speech[name]
    latest = merged_once(tmp_path, base).latest("main").resolve()
    (architecture,) = AutoConfig.from_pretrained(latest).architectures
    model = getattr(transformers, architecture).from_pretrained(latest, output_loading_info=True)
    assert not model[1]["missing_keys"] and not model[1]["unexpected_keys"]
    ours, theirs = (AutoProcessor.from_pretrained(path) for path in (latest, base))
    assert ours.tokenizer("a b").input_ids == theirs.tokenizer("a b").input_ids
    assert ours.feature_extractor.to_dict() == theirs.feature_extractor.to_dict()
    missing = {path.name for path in base.iterdir()} - {path.name for path in latest.iterdir()}
    assert not missing


def test_transformers_loads_a_variant_in_shards(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    )
    model.save_pretrained(tmp_path / "base", variant="fp16", max_shard_size="20kB")
    home = make_home(tmp_path / "home", tmp_path / "base")
    moved = {name: tensor + 0.01 for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    save_file(moved, home.inbox / "e.safetensors")
    drain(home)
    latest = home.latest("main").resolve()
    loaded, info = BertModel.from_pretrained(latest, variant="fp16", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(dict(loaded.state_dict()), {n: moved.get(n, t) for n, t in model.state_dict().items()})
    assert (latest / "model.safetensors.index.fp16.json").is_file()
