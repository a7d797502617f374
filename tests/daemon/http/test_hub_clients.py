"""The Hub's real clients against a real server, each in a process of its own with an empty cache."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from starlette.requests import Request

from daemon.config import Settings
from daemon.layout import Home
from tests.daemon.homes import drain, live, make_home, quick
from tests.daemon.pulls import served
from tests.daemon.versions.test_adapter_output import llama, write_model

ROOT = Path(__file__).parents[3]
CLIENTS = ("transformers", "peft", "huggingface_hub")
MISSING = [name for name in CLIENTS if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.filterwarnings("ignore:::(transformers|peft)"),
]


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "[PAD]", *(f"w{n}" for n in range(58))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    path = tmp_path_factory.mktemp("hub") / "base"
    write_model(path, llama)
    write_tokenizer(path)
    return path


def settings() -> Settings:
    return quick(heads={"main": {"adapter": {"rank": 4}}}, publish={"shard_bytes": "20KB"})


def merge(home: Home, base: Path, embedding: float) -> None:
    """Merges an expert; two of them differ in the embedding alone."""
    weights = load_file(base / "model.safetensors")
    tuned = {
        name: tensor + (embedding if "embed" in name else 0.1) * torch.eye(*tensor.shape)
        for name, tensor in weights.items()
        if tensor.ndim == 2
    }
    tuned = {**weights, **tuned}
    (home.inbox / "expert").mkdir()
    save_file(tuned, home.inbox / "expert" / "model.safetensors", metadata={"format": "pt"})
    drain(home, settings())


class Asked:
    """What a server was asked for."""

    def __init__(self) -> None:
        self.all: list[tuple[str, str]] = []

    def __call__(self, request: Request) -> None:
        self.all.append((request.method, request.url.path))

    def sent(self) -> set[str]:
        """The names of the files whose bytes were sent."""
        return {path.rpartition("/")[2] for method, path in self.all if method == "GET" and "/resolve/" in path}


def environment(origin: str, folder: Path, **more: str) -> dict[str, str]:
    """Of a client with an empty cache that knows no other Hub."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MAINSTEM_"))}
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
    return {**ours, **offline, "HF_ENDPOINT": origin, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", **more}


@contextmanager
def client(script: str, origin: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    path = Path(__file__).with_name(script)
    with (folder / "err").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, path],
            env=environment(origin, folder),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def published(home: Home, n: int) -> dict[str, str]:
    """The digests of a version's files, less the adapter's."""
    files = json.loads(home.manifest("main", n).read_bytes())["files"]
    return {file["name"]: file["sha256"] for file in files if not file["name"].startswith("adapter/")}


def test_a_version_is_read_by_name_and_a_new_one_sends_what_changed(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    merge(home, base, 0.2)
    asked = Asked()
    heard: dict[str, Any] = {}
    with served(home, asked) as origin, client("hub_reader.py", origin, tmp_path) as process:  # type: ignore[arg-type]
        assert process.stdin and process.stdout

        def listen(until: str) -> None:
            for line in process.stdout or ():
                heard.update(json.loads(line))
                if until in heard:
                    return
            pytest.fail((tmp_path / "err").read_text())

        listen("errors")
        assert heard["first"] == published(home, 1)
        assert heard["old"] == published(home, 0)
        assert heard["tokens"] == [3, 4] and heard["generated"].startswith("w1 w2")
        assert heard["adapter"] == "PeftModel" and heard["rank"]
        assert heard["errors"] == [
            "RemoteEntryNotFoundError",
            "RevisionNotFoundError",
            "RepositoryNotFoundError",
            "RepositoryNotFoundError",
        ]
        merge(home, base, 0.3)
        asked.all.clear()
        process.stdin.write("\n")
        process.stdin.flush()
        listen("pinned")
    assert heard["second"] == published(home, live(home)) != heard["first"]
    assert heard["pinned"] == heard["first"]
    before, now = published(home, 1), published(home, live(home))
    changed = {name for name in now if before.get(name) != now[name]}
    shards = {name for name in now if name.endswith(".safetensors")}
    assert len(shards) > 3 and len(shards & changed) == 1
    assert asked.sent() == changed


def test_hf_download_and_no_other_file(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base)
    with served(home) as origin:
        command = [sys.executable, "-m", "huggingface_hub.cli.hf", "download", "mainstem/main"]
        local = tmp_path / "local"
        for more in ([], ["--local-dir", str(local)]):
            done = subprocess.run(
                [*command, "--revision", "v0", *more], env=environment(origin, tmp_path), capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
    wanted = published(home, 0)
    assert {path.name for path in local.iterdir() if path.is_file()} == set(wanted)
    for name in wanted:
        assert (local / name).read_bytes() == (home.version("main", 0) / name).read_bytes()
