"""The Hub's real clients against a real server, each in a process of its own with an empty cache."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load_file, save_file
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.testing import capture_logs

from daemon.arrivals.uploads import Uploads
from daemon.config import Http, Settings
from daemon.http import HttpServer, create_app
from daemon.http.hub import pushing
from daemon.layout import Home
from registry.reader import Reader
from registry.records import Status
from tests.daemon.homes import drain, experts, make_home, quick, tree
from tests.daemon.versions.test_adapter_output import llama, write_model

ROOT = Path(__file__).parents[3]
TOKEN = "hf_a-token-of-enough-characters"
CLIENTS = ("transformers", "peft", "huggingface_hub", "accelerate")
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

    def heard(self, app: ASGIApp) -> ASGIApp:
        async def hear(scope: Scope, receive: Receive, send: Send) -> None:
            self.all.append((scope["method"], scope["path"]))
            await app(scope, receive, send)

        return hear

    def sent(self) -> set[str]:
        """The names of the files whose bytes were sent."""
        return {path.rpartition("/")[2] for method, path in self.all if method == "GET" and "/resolve/" in path}


def environment(origin: str, folder: Path, **more: str) -> dict[str, str]:
    """Of a client with an empty cache that knows no other Hub."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MAINSTEM_"))}
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}
    return {**ours, **offline, "HF_ENDPOINT": origin, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", **more}


@contextmanager
def taking(home: Home, asked: Asked) -> Iterator[tuple[str, Uploads]]:
    """A server over a home that takes what is pushed; its address."""
    uploads = Uploads(home, Http.model_validate({"write_token": TOKEN}))
    with Reader.open(home.registry) as reader:
        app = asked.heard(create_app(home, reader, CollectorRegistry(), lambda: None, uploads))
        with HttpServer(app, "127.0.0.1", 0) as (host, port):
            yield f"http://{host}:{port}", uploads


@dataclass
class Story:
    """What the client said, and what the server was asked and noted meanwhile."""

    home: Home
    heard: dict[str, Any]
    sent_again: set[str]
    pushed: list[tuple[str, str]]
    early: list[str]


@pytest.fixture(scope="module")
def story(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """A client reads, another version becomes live, it reads again and pushes. One, for its imports take long."""
    folder = tmp_path_factory.mktemp("story")
    home = make_home(folder / "home", base, [("main", "mean", {})])
    merge(home, base, 0.2)
    asked, heard = Asked(), {}
    words = [sys.executable, Path(__file__).with_name("hub_client.py"), base, folder]
    with taking(home, asked) as (origin, uploads), capture_logs() as logs, (folder / "err").open("w") as errors:
        variables = environment(origin, folder, HF_TOKEN=TOKEN)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        with subprocess.Popen(words, env=variables, **pipes) as process:  # type: ignore[call-overload]

            def listen(until: str) -> None:
                for line in process.stdout:
                    heard.update(json.loads(line) if line.startswith('{"') else {})
                    if until in heard:
                        return
                pytest.fail((folder / "err").read_text())

            try:
                listen("errors")
                merge(home, base, 0.3)
                asked.all.clear()
                process.stdin.write("\n")
                process.stdin.flush()
                listen("pinned")
                again = asked.sent()
                listen("whoami")
            finally:
                process.kill()
        pushed = [(one["drop"], one["commit"]) for one in logs if one["event"] == "pushed"]
        early = [path.name for path in home.inbox.iterdir()]
        for one in uploads._open.values():
            one.touched -= uploads.quiet_seconds
        uploads.tend()
    return Story(home, heard, again, pushed, early)


def published(home: Home, n: int) -> dict[str, str]:
    """The digests of a version's files, less the adapter's."""
    files = json.loads(home.manifest("main", n).read_bytes())["files"]
    return {file["name"]: file["sha256"] for file in files if not file["name"].startswith("adapter/")}


def test_versions_are_read_by_name(story: Story) -> None:
    heard, home = story.heard, story.home
    assert heard["first"] == published(home, 1)
    assert heard["old"] == published(home, 0)
    assert heard["commit"] == hashlib.sha256(home.manifest("main", 1).read_bytes()).hexdigest()[:40]
    assert heard["tokens"] == [3, 4] and heard["generated"].startswith("w1 w2")
    assert heard["adapter_loaded"] == "PeftModel" and heard["rank"]
    assert heard["errors"] == [
        "RemoteEntryNotFoundError",
        "RevisionNotFoundError",
        "RepositoryNotFoundError",
        "RepositoryNotFoundError",
    ]


def test_a_new_version_sends_what_changed(story: Story) -> None:
    before, now = published(story.home, 1), published(story.home, 2)
    assert story.heard["second"] == now != before
    assert story.heard["pinned"] == before
    changed = {name for name in now if before.get(name) != now[name]}
    shards = {name for name in now if name.endswith(".safetensors")}
    assert len(shards) > 3 and len(shards & changed) == 1
    assert story.sent_again == changed


def test_what_trainers_push_is_merged(story: Story) -> None:
    """With hf_xet installed, as it is with huggingface_hub: no file is large enough to need it."""
    home, last = story.home, dict(story.pushed)
    names = ("trained", "model", "adapter")
    assert story.early == [] and story.heard["whoami"] == "mainstem"
    assert [drop for drop, _ in story.pushed].count("trained") == 3  # two saves, and the end
    assert {name: last[name] for name in names} == {name: story.heard[name] for name in names}
    within = {name: {path.name for path in (home.inbox / name).iterdir()} for name in names}
    assert {"model.safetensors", "README.md", "training_args.bin"} <= within["trained"]
    assert {"model.safetensors", "tokenizer.json"} <= within["model"]
    drain(home, settings())
    assert {expert.name: (expert.status, expert.kind) for expert in experts(home)[2:]} == {
        "trained": (Status.MERGED, "folder"),
        "model": (Status.MERGED, "folder"),
        "adapter": (Status.MERGED, "adapter"),
    }


def test_what_the_callback_says_is_pushed_and_recorded(story: Story) -> None:
    """By the Hub's commit in the cache, though another version was live by then."""
    said = {"task": "numbers", "weight": 2, "data": ["urn:numbers"], "trained_from": "main/1"}
    assert story.heard["checkpoint"] == said and story.heard["another_process_wrote"] is False
    drain(story.home, settings())
    (trained,) = [expert for expert in experts(story.home) if expert.name == "trained"]
    assert (trained.about, trained.trained_head, trained.trained_version) == (said, "main", 1)


def hf(*words: str, origin: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The command of huggingface_hub."""
    command = [sys.executable, "-m", "huggingface_hub.cli.hf", *words]
    return subprocess.run(command, env=environment(origin, folder, **more), capture_output=True, text=True)


def test_hf_download_and_hf_upload(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload: by git-lfs, of more files than may come at once, and with a client that insists on Xet."""
    monkeypatch.setattr(pushing, "MOST_BYTES_IN_COMMIT", 100)
    home = make_home(tmp_path / "home", base)
    local, folder = tmp_path / "local", tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    for n in range(7):
        (folder / "below" / f"{n}.bin").write_bytes(os.urandom(1000 + n))
    (folder / "model.safetensors").write_bytes(os.urandom(3 << 20))
    shutil.copy(folder / "model.safetensors", folder / "below")  # as a last-checkpoint/ is
    (folder / "_READY").write_bytes(b"")
    with taking(home, Asked()) as (origin, _):
        there: dict[str, Any] = {"origin": origin, "folder": tmp_path, "HF_TOKEN": TOKEN}
        done = hf("download", "mainstem/main", "--revision", "v0", "--local-dir", str(local), **there)
        assert done.returncode == 0, done.stderr
        done = hf("upload", "mainstem/expert", str(folder), HF_HUB_DISABLE_XET="1", **there)
        assert done.returncode == 0, done.stderr
        refused = hf("upload", "mainstem/expert", str(folder), **there)
    wanted = published(home, 0)
    assert {path.name for path in local.iterdir() if path.is_file()} == set(wanted)
    assert all((local / name).read_bytes() == (home.version("main", 0) / name).read_bytes() for name in wanted)
    assert tree(home.inbox / "expert") == tree(folder)
    assert refused.returncode != 0 and "HF_HUB_DISABLE_XET=1" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
def test_sentence_transformers_by_name(base: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", base)
    program = "import sentence_transformers as s; print(s.SentenceTransformer('mainstem/main').encode('w1 w2').shape)"
    with taking(home, Asked()) as (origin, _):
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment(origin, tmp_path), capture_output=True, text=True
        )
    assert done.stdout.split()[-1] == "(32,)", done.stderr


READ_ON = """
import hashlib, pathlib, sys
from huggingface_hub import HfApi, snapshot_download
for n in range(int(sys.argv[1])):
    folder = pathlib.Path(snapshot_download("mainstem/main", max_workers=2))
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(folder.name, path.relative_to(folder), hashlib.sha256(path.read_bytes()).hexdigest(), flush=True)
"""


@pytest.mark.slow
def test_32_clients_while_versions_change(base: Path, tmp_path: Path) -> None:
    """Whatever a client was given as a commit is that version, byte for byte."""
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    with taking(home, Asked()) as (origin, _):
        clients = []
        for n in range(32):
            (tmp_path / str(n)).mkdir()
            clients.append(
                subprocess.Popen(
                    [sys.executable, "-c", READ_ON, "4"],
                    env=environment(origin, tmp_path / str(n)),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        n = 0
        while any(one.poll() is None for one in clients):
            n += 1
            merge(home, base, 0.1 * n)
        said = [one.communicate() for one in clients]
    assert [one.returncode for one in clients] == [0] * 32, [err for _, err in said if err]
    by_commit = {hashlib.sha256(home.manifest("main", v).read_bytes()).hexdigest()[:40]: v for v in range(n + 1)}
    seen = set()
    for out, _ in said:
        found: dict[str, dict[str, str]] = {}
        for line in out.splitlines():
            commit, name, digest = line.split()
            found.setdefault(commit, {})[name] = digest
        for commit, files in found.items():
            assert files == published(home, by_commit[commit])
            seen.add(commit)
    assert len(seen) > 2
