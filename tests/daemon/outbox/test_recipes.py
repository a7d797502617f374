"""Each recipe of deploy/hooks, run as the hook that it says, does what its server asks for.

The servers are a receiver that answers in their shapes: those of the sources of SGLang 0.5 and vLLM 0.32, and of
Triton's protocol. MLflow's registry is a real one.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from daemon.layout import Home
from daemon.outbox.hooking import filled
from daemon.outbox.told import Answer, payload
from daemon.sections import Hooks
from registry.records import Delivery, Event
from tests.daemon.outbox.receiver import Received, Receiver, Reply, receiving

RECIPES = Path(__file__).parents[3] / "deploy" / "hooks"
NAMES = sorted(path.name for path in RECIPES.iterdir() if path.name not in ("asking.py", "__pycache__"))


WHEN = datetime(2026, 3, 1, tzinfo=UTC)


class Sglang:
    """Weights from disk, and adapters by name."""

    def __init__(self) -> None:
        self.weights, self.adapters = ("", ""), dict[str, str]()

    def __call__(self, request: Received) -> Reply:
        asked = request.said
        if request.path == "/update_weights_from_disk":
            good = Path(asked["model_path"]).is_dir()
            if good:
                self.weights = asked["model_path"], asked["weight_version"]
            said = {"success": good, "message": "Succeeded." if good else "no such folder", "num_paused_requests": 0}
        elif request.path == "/load_lora_adapter":
            good = asked["lora_name"] not in self.adapters and Path(asked["lora_path"]).is_dir()
            if good:
                self.adapters[asked["lora_name"]] = asked["lora_path"]
            said = {"success": good, "error_message": "", "loaded_adapters": self.adapters}
        elif request.path == "/unload_lora_adapter":
            good = self.adapters.pop(asked["lora_name"], None) is not None
            said = {"success": good, "error_message": "", "loaded_adapters": self.adapters}
        else:
            return 404, '{"detail": "Not Found"}'
        return (200 if good else 400), json.dumps(said)


class Vllm:
    """Adapters by name; and, asleep, weights that are read again."""

    inplace = True

    def __init__(self) -> None:
        self.adapters, self.steps = dict[str, str](), list[str]()

    def __call__(self, request: Received) -> Reply:
        asked = request.said
        name = asked.get("lora_name", "")
        if request.path == "/v1/load_lora_adapter":
            if name in self.adapters and not (self.inplace and asked.get("load_inplace")):
                message = f"The lora adapter '{name}' has already been loaded."
                return 400, self.error(message, "InvalidUserInput", 400)
            if not Path(asked["lora_path"]).is_dir():
                return 404, self.error(f"No adapter found for '{name}'", "NotFoundError", 404)
            self.adapters[name] = asked["lora_path"]
            return 200, f"Success: LoRA adapter '{name}' added successfully."
        if request.path == "/v1/unload_lora_adapter":
            if self.adapters.pop(name, None) is None:
                return 404, self.error(f"The lora adapter '{name}' cannot be found.", "NotFoundError", 404)
            return 200, f"Success: LoRA adapter '{name}' removed successfully."
        if request.path == "/collective_rpc" and self.steps[-1:] == ["/wake_up?tags=weights"]:
            self.steps.append(asked["method"])
            return 200, '{"results": [null]}'
        if request.path in ("/sleep?level=2", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"):
            self.steps.append(request.path)
            return 200, ""
        return 404, '{"detail": "Not Found"}'

    @staticmethod
    def error(message: str, kind: str, code: int) -> str:
        return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


class OlderVllm(Vllm):
    """One that loads no adapter in the place of another."""

    inplace = False


class Triton:
    """Models by name, out of a repository."""

    def __init__(self, repository: Path) -> None:
        self.repository, self.loaded = repository, dict[str, Any]()

    def __call__(self, request: Received) -> Reply:
        found = re.fullmatch(r"/v2/repository/models/(\w+)/load", request.path)
        if not found or not (self.repository / found[1] / "config.pbtxt").exists():
            return 400, '{"error": "failed to load, failed to poll from model repository"}'
        self.loaded[found[1]] = json.loads((self.repository / found[1] / "1" / "model.json").read_text())
        return 200, ""


def said(name: str) -> tuple[str, ...]:
    """The command that a recipe says."""
    text = "\n".join(line.removeprefix("#").strip() for line in (RECIPES / name).read_text().splitlines())
    block = re.search(r"^\[hooks\]\n(published = .*)$", text, re.MULTILINE)
    assert block, name
    (command,) = Hooks.model_validate(tomllib.loads(block[1])).published
    assert command[0] == f"/path/to/{name}"
    return command


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    for version in (1, 2):
        (home.version("main", version) / "adapter").mkdir(parents=True)
    return home


def run(home: Home, receiver: Receiver, name: str, version: int = 1, **places: Path) -> Answer:
    """Runs a recipe with the arguments that it says, but for where its server and its files are."""
    origin = receiver.url.rpartition("/")[0]
    command = [str(RECIPES / name)]
    for word in said(name)[1:]:
        word = re.sub(r"^http://[\d.:]+", origin, word)
        command.append(str(places.get(re.sub(r"\W", "_", word.strip("/")), word)))
    delivery = Delivery(1, 1, "msg_1", Event.PUBLISHED, {"head": "main", "version": version}, WHEN)
    data = payload(home, delivery)["data"]
    # not by Hooking, whose own tests run it: that would start twice as many interpreters
    done = subprocess.run([filled(word, data) for word in command], capture_output=True, text=True, check=False)
    return Answer(done.returncode == 0, done.stdout + done.stderr)


def test_sglang_takes_weights(home: Home, receiver: Receiver) -> None:
    receiver.answer = server = Sglang()
    answer = run(home, receiver, "sglang_weights.py", 2)
    assert answer.delivered, answer
    assert server.weights == (str(home.version("main", 2)), "main/2")
    answer = run(home, receiver, "sglang_weights.py", 3)
    assert not answer.delivered and "no such folder" in answer.text and server.weights[1] == "main/2"


@pytest.mark.parametrize(
    ("name", "server"),
    [("sglang_adapter.py", Sglang), ("vllm_adapter.py", Vllm), ("vllm_adapter.py", OlderVllm)],
)
def test_an_adapter_takes_the_place_of_the_one_before(
    home: Home, receiver: Receiver, name: str, server: type[Sglang] | type[Vllm]
) -> None:
    receiver.answer = answering = server()
    for version in (1, 2):
        answer = run(home, receiver, name, version)
        assert answer.delivered, answer
        assert answering.adapters == {"merged": str(home.version("main", version) / "adapter")}
    receiver.answer = lambda request: (500, "out of memory") if "unload" not in request.path else answering(request)
    answer = run(home, receiver, name)
    assert not answer.delivered and "500: out of memory" in answer.text


def test_vllm_keeps_the_adapter_that_it_has_where_the_next_one_will_not_do(home: Home, receiver: Receiver) -> None:
    receiver.answer = server = Vllm()
    assert run(home, receiver, "vllm_adapter.py", 1).delivered
    for version, status in ((3, 404), (2, 400)):  # there is no 3; the rank of 2 is too high
        if status == 400:
            receiver.answer = lambda _: (400, Vllm.error("LoRA rank 64 is greater than max_lora_rank", "", 400))
        answer = run(home, receiver, "vllm_adapter.py", version)
        assert not answer.delivered and ("No adapter found" if version == 3 else "LoRA rank 64") in answer.text
    assert server.adapters == {"merged": str(home.version("main", 1) / "adapter")}
    assert not any("unload" in one.path for one in receiver.requests)


def test_vllm_reads_its_weights_again(home: Home, receiver: Receiver) -> None:
    receiver.answer = server = Vllm()
    assert run(home, receiver, "vllm_weights.py").delivered
    assert server.steps == ["/sleep?level=2", "/wake_up?tags=weights", "reload_weights", "/wake_up?tags=kv_cache"]
    receiver.answer = lambda _: (404, "")  # no development mode
    assert not run(home, receiver, "vllm_weights.py").delivered


def test_triton_loads_a_version(home: Home, receiver: Receiver, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    receiver.answer = server = Triton(repository)
    assert not run(home, receiver, "triton_model.py", srv_triton_models=repository).delivered  # without config.pbtxt
    (repository / "chat" / "config.pbtxt").write_text('backend: "vllm"\n')
    (repository / "chat" / "1" / "model.json").write_text('{"gpu_memory_utilization": 0.5}')
    for version in (1, 2):
        answer = run(home, receiver, "triton_model.py", version, srv_triton_models=repository)
        assert answer.delivered, answer
        folder = str(home.version("main", version))
        assert server.loaded == {"chat": {"gpu_memory_utilization": 0.5, "model": folder}}


def test_any_server_is_restarted_on_a_link(home: Home, receiver: Receiver, tmp_path: Path) -> None:
    link, restart = tmp_path / "link", tmp_path / "restart"
    restart.write_text(f'#!/bin/sh\nreadlink {link} >> {tmp_path}/seen\n[ "$1 $2" = "restart chat.service" ]\n')
    restart.chmod(0o755)
    for version in (1, 2):
        answer = run(home, receiver, "restart.sh", version, srv_models_chat=link, systemctl=restart)
        assert answer.delivered, answer
    assert (tmp_path / "seen").read_text().split() == [str(home.version("main", n)) for n in (1, 2)]


def test_a_redirect_is_not_followed_for_the_servers_key_would_go_along(home: Home, receiver: Receiver) -> None:
    with receiving() as other:
        receiver.answer = lambda _: (302, f"location: {other.url}")
        answer = run(home, receiver, "vllm_adapter.py")
    assert not answer.delivered and ": 302: " in answer.text


def test_no_server_is_a_failure(home: Home) -> None:
    assert not run(home, Receiver("http://127.0.0.1:9/told"), "vllm_weights.py").delivered


def test_a_server_that_loads_by_name_is_restarted_on_a_revision(home: Home, receiver: Receiver, tmp_path: Path) -> None:
    file, restart = tmp_path / "chat.env", tmp_path / "restart"
    restart.write_text(f'#!/bin/sh\n. {file}\necho "$MODEL_ID@$REVISION" >> {tmp_path}/seen\n')
    restart.chmod(0o755)
    for version in (1, 2):
        answer = run(home, receiver, "revision.sh", version, srv_models_chat_env=file, systemctl=restart)
        assert answer.delivered, answer
    assert (tmp_path / "seen").read_text().split() == ["mainstem/main@v1", "mainstem/main@v2"]
    assert sorted(tmp_path.glob("chat.env*")) == [file]


def test_llama_cpp_gets_what_its_converter_makes(home: Home, receiver: Receiver, tmp_path: Path) -> None:
    """The converter here takes the arguments of the real one, which is too large for the tests."""
    file, convert, restart = tmp_path / "chat.gguf", tmp_path / "convert", tmp_path / "restart"
    convert.write_text(
        f"#!{sys.executable}\n"
        "import argparse, pathlib\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--outfile', type=pathlib.Path)\n"
        "parser.add_argument('--outtype', choices=['f32', 'f16', 'bf16', 'q8_0', 'auto'])\n"
        "parser.add_argument('model')\n"
        "asked = parser.parse_args()\n"
        "asked.outfile.write_text(asked.model)\n"
        "assert pathlib.Path(asked.model).is_dir()\n"
    )
    restart.write_text(f"#!/bin/sh\ncat {file} >> {tmp_path}/seen\necho >> {tmp_path}/seen\n")
    for program in (convert, restart):
        program.chmod(0o755)
    places = {
        "opt_llama_cpp_convert_hf_to_gguf_py": convert,
        "srv_models_chat_gguf": file,
        "systemctl": restart,
    }
    for version in (1, 2, 3):  # there is no 3
        answer = run(home, receiver, "llama_cpp.sh", version, **places)
        assert answer.delivered is (version < 3), answer
        assert sorted(tmp_path.glob("chat.gguf*")) == [file]
    assert (tmp_path / "seen").read_text().split() == [str(home.version("main", n)) for n in (1, 2)]
    assert file.read_text() == str(home.version("main", 2))


BY_TURNS = """
import json, runpy, sys
words = sys.argv[1:4]
for more in json.loads(sys.argv[4]):
    sys.argv = [*words, *more]
    runpy.run_path(words[0])
import mlflow
mlflow.set_tracking_uri(words[1])
mlflow.set_registry_uri(words[1])
found = mlflow.MlflowClient().search_model_versions()
copied = mlflow.artifacts.download_artifacts(f"models:/{words[2]}@live")
print(json.dumps([{one.version: [one.source, one.tags] for one in found}, copied]))
"""  # one interpreter for all: it takes two seconds to import mlflow


@pytest.mark.skipif(find_spec("mlflow") is None, reason="not installed: mlflow-skinny")
def test_mlflow_has_each_version_once_and_knows_the_live_one(home: Home, tmp_path: Path) -> None:
    tags = {}
    for version in (1, 2):
        raw = json.dumps({"head": "main", "version": version}).encode()
        (home.version("main", version) / "manifest.json").write_bytes(raw)
        tags[version] = {"head": "main", "version": str(version), "sha256": hashlib.sha256(raw).hexdigest()}
    one, two = (str(home.version("main", version)) for version in (1, 2))
    name, source = (filled(said("mlflow_model.py")[n], {"head": "main", "version": 1}) for n in (2, 4))
    turns = json.dumps([[two], [one, source], [two]])  # 2, back to 1, and 2 again
    # in memory, where there is such a place: MLflow makes its tables in some fifty transactions
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else str(tmp_path)
    with TemporaryDirectory(dir=memory) as folder:
        url = f"sqlite:///{folder}/mlflow.db"
        words = [sys.executable, "-c", BY_TURNS, str(RECIPES / "mlflow_model.py"), url, name, turns]
        done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert [line.removeprefix(f"{url} has ") for line in lines] == [
        "main/2 as mainstem-main 1, live",
        "main/1 as mainstem-main 2, live",
        "main/2 as mainstem-main 1, live",
    ]
    found, copied = json.loads(last)
    assert found == {"1": [two, tags[2]], "2": [source, tags[1]]}
    assert json.loads((Path(copied) / "manifest.json").read_bytes()) == {"head": "main", "version": 2}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_for_what_it_was_written(name: str) -> None:
    text = " ".join((RECIPES / name).read_text().replace("\n#", "").split())
    assert said(name) and (RECIPES / name).stat().st_mode & 0o111 == 0o111
    servers = "SGLang|vLLM|Triton|TGI|MLflow|llama.cpp of"
    assert name == "restart.sh" or re.search(rf"Written for ({servers}) [\d.]+", text)
    assert name in ("restart.sh", "mlflow_model.py") or "never run against" in text


def test_every_recipe_is_tested() -> None:
    source = Path(__file__).read_text()
    assert all(f'"{name}"' in source for name in NAMES)
