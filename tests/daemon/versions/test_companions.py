"""Which files of a base go with the weights: everything but weights, code and secrets, and nothing from elsewhere."""

import json
import os
from pathlib import Path
from urllib.parse import quote
from urllib.request import urlopen

import pytest

from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.founding import found
from daemon.layout import Home
from daemon.manifest import FileEntry
from daemon.pull.pulling import pull
from daemon.versions.companions import KENLM, MOST_BYTES, companions
from daemon.versions.sealing import copy_files, sync_folders
from projector.methods import make
from tests.daemon.homes import drain, make_home, put
from tests.daemon.pulls import served
from tests.models import write_base, write_expert

LOADED = [
    "bpe.codes",  # PhoBERT
    "sentencepiece.bpe.model",
    "source.spm",
    "tokens.txt",  # a vocabulary of speech models
    "vocab.pl",
    "dict.txt",
    "tekken.json",
    "params.json",  # Mistral's own layout
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "normalizer.json",
    "mel_filters.npz",
    "alphabet.json",
    "language_model/attrs.json",
    "scheduler/scheduler_config.json",
    "scheduler_config.json",
    "model_index.json",
    "voices/en/speaker 1 #2.json",
    "USE_POLICY.md",
    "1_Pooling/config.json",
    "1_Pooling/README.md",
]
LEFT_OUT = {
    "model.fp16.safetensors": "weights",
    "pytorch_model.bin": "weights",
    "tf_model.h5": "weights",
    "flax_model.msgpack": "weights",
    "model.Q4_K_M.gguf": "weights",
    "onnx/model.onnx": "weights",
    "original/consolidated.00.pth": "weights",
    "optimizer.pt": "weights",
    "unet/diffusion_pytorch_model.safetensors": "weights",
    "model.safetensors.aria2": "weights",
    "rng_state_0.json": "of a training run",
    "trainer_state.json": "of a training run",
    "modeling_custom.py": "code",
    "1_Pooling/run.SH": "code",
    "id_rsa": "a secret, by its name",
    "hf_token.txt": "a secret, by its name",
    "token": "a secret, by its name",
    "gcp-credentials.json": "a secret, by its name",
    ".env": "hidden",
    ".git": "hidden",
    "checkpoint-500": "a folder of something else",
    "adapters": "a folder of something else",
    "__pycache__": "a folder of something else",
    "home": "a folder of something else",
}
BELOW = {
    ".git": "config",
    "checkpoint-500": "config.json",
    "adapters": "adapter_config.json",
    "__pycache__": "x.json",
    "home": "state/.founding",
}
SILENT = ["README.md", "manifest.json", "adapter_config.json", "expert.json", "model.safetensors.index.fp16.json"]


def lay(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


def below(name: str) -> str:
    return f"{name}/{BELOW[name]}" if name in BELOW else name


def test_everything_goes_but_weights_code_and_secrets(tmp_path: Path) -> None:
    lay(tmp_path, *LOADED, *map(below, LEFT_OUT), *SILENT, "model.safetensors")
    found = companions(tmp_path, ["model.safetensors"])
    assert found.files == sorted(LOADED)
    assert sorted(found.left_out) == sorted(f"{name} ({why})" for name, why in LEFT_OUT.items())


def test_weights_of_a_module_of_sentence_transformers_go_too(tmp_path: Path) -> None:
    modules = [{"path": ""}, {"path": "dense[1]"}, {"path": None}]
    lay(
        tmp_path,
        "2_Dense/model.safetensors",
        "2_Dense/pytorch_model.bin",
        "dense[1]/model.safetensors",
        "dense1/x.safetensors",
    )
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    found = companions(tmp_path)
    assert found.files == ["2_Dense/model.safetensors", "dense[1]/model.safetensors", "modules.json"]
    for broken in ("{", '{"path": 1}', "[1]", "[" * 100_000):
        (tmp_path / "modules.json").write_text(broken)
        assert companions(tmp_path).files == ["2_Dense/model.safetensors", "modules.json"]


def test_a_link_is_followed_to_where_the_weights_are_and_nowhere_else(tmp_path: Path) -> None:
    """As a snapshot in the hub's cache: every file of it is a link into blobs/."""
    blobs, snapshot, outside = (tmp_path / name for name in ("blobs", "snapshots/1", "outside"))
    lay(blobs, "a", "b")
    lay(outside, "passwords", "folder/x.json")
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to("../../blobs/a")
    (snapshot / "vocab.txt").symlink_to("../../blobs/b")
    (snapshot / "merges.txt").symlink_to(outside / "passwords")
    (snapshot / "dict").symlink_to(outside / "folder")
    (snapshot / "gone.json").symlink_to("nowhere")
    (snapshot / "again.txt").symlink_to("vocab.txt")
    found = companions(snapshot, ["model.safetensors"])
    assert found.files == ["again.txt", "vocab.txt"]
    assert sorted(found.left_out) == [
        "dict (a link to a folder)",
        "gone.json (no file, or none that can be read)",
        "merges.txt (a link that leads out of the folder)",
    ]


def test_what_is_huge_too_deep_or_not_to_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay(tmp_path, "corpus.txt", "vocab.txt", "/".join("d" * 12) + "/x.json")
    os.truncate(tmp_path / "corpus.txt", MOST_BYTES + 1)
    found = companions(tmp_path)
    assert found.files == ["vocab.txt"]
    assert [text.partition(" (")[2] for text in found.left_out] == [
        f"{MOST_BYTES + 1} bytes, {MOST_BYTES} at the most)",
        "a folder that lies too deep, or cannot be read)",
    ]
    lay(tmp_path, "a", "b", "c")
    for bound, most in (("MOST_FILES", 3), ("MOST_BYTES_TOGETHER", 12)):
        with monkeypatch.context() as patched, pytest.raises(BadHome, match="holds more than") as refused:
            patched.setattr(f"daemon.versions.companions.{bound}", most)
            companions(tmp_path)
        assert "folder of its own" in refused.value.hint


def test_no_name_goes_that_no_pull_would_take(tmp_path: Path) -> None:
    long = "/".join("n" * 200 for _ in range(6))
    lay(tmp_path, f"{long}/x.json", "a/manifest.json")
    found = companions(tmp_path)
    assert found.files == ["a/manifest.json"] and "no pull takes" in found.left_out[0]


def test_the_words_of_a_speech_decoder_go_though_they_are_called_like_weights(tmp_path: Path) -> None:
    lay(tmp_path, "language_model/5gram.bin", "language_model/other.bin")
    (tmp_path / "language_model" / "5gram.bin").write_bytes(KENLM + b" format version 5\n\0")
    assert companions(tmp_path).files == ["language_model/5gram.bin"]


def test_init_says_what_it_leaves_out(tmp_path: Path) -> None:
    base = lay(write_base(tmp_path / "base", 1), "bpe.codes", "modeling_x.py", *(f"{n}.bin" for n in range(30)))
    said: list[str] = []
    found(Home(tmp_path / "home"), base, [("main", make("mean", {}))], said.append)
    (line,) = [text for text in said if text.startswith("left out")]
    assert "0.bin (weights), " in line and line.endswith("and 11 more")


def test_every_version_has_them_and_every_reader_gets_them(tmp_path: Path) -> None:
    names = ["bpe.codes", "a/b/c/d.json", "voices/en/speaker 1 #2?%.json", "größe.txt"]
    base = lay(write_base(tmp_path / "base", 1), *names)
    home = make_home(tmp_path / "home", base)
    put(home, write_expert(tmp_path / "e.safetensors", base, 2))
    drain(home)
    with served(home) as origin:
        pull(origin, tmp_path / "pulled")
        for name in names:
            wanted = f"{name}\n".encode()
            assert (home.latest("main") / name).read_bytes() == (tmp_path / "pulled" / name).read_bytes() == wanted
            for at in ("latest", "versions/0"):
                with urlopen(f"{origin}/v1/heads/main/{at}/files/{quote(name)}") as answer:
                    assert answer.read() == wanted
    again = make_home(tmp_path / "again", home.version("main", 1))  # a version is a base too
    assert {name for name in names if (again.version("main", 0) / name).is_file()} == set(names)


def test_a_home_made_before_has_the_companions_that_it_has(tmp_path: Path) -> None:
    """Those of its version 0, whatever the rules are by now, and whatever lies beside the base meanwhile."""
    base = lay(write_base(tmp_path / "base", 1), "vocab.txt")
    home = make_home(tmp_path / "home", base)
    lay(home.base, "notes.txt", "optimizer.pt")
    put(home, write_expert(tmp_path / "e.safetensors", base, 2))
    drain(home)
    names = {path.name for path in home.version("main", 1).iterdir()}
    assert names == {"README.md", "manifest.json", "model.safetensors", "config.json", "vocab.txt"}


def test_folders_below_folders_are_durable_and_for_everybody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = lay(tmp_path / "source", "a/b/c.json"), tmp_path / "target"
    before = os.umask(0o077)
    try:
        copy_files(source, target, ["a/b/c.json"])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (target / "a", target / "a" / "b")} == {0o755}
    synced: list[str] = []
    sync = durable.sync_folder

    def noted(path: Path) -> None:
        synced.append(path.relative_to(target).as_posix())
        sync(path)

    monkeypatch.setattr(durable, "sync_folder", noted)
    sync_folders(target, [FileEntry("a/b/c.json", 1, "")])
    assert synced == ["a/b", "a", "."]  # a name counts once the folder that it is in is synced
