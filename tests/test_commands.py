"""Every command of the README and of docs/, and every Python program there, is run as a reader would run it.

The fenced blocks of a page are run in their order, in one shell and a folder of their own: `sh` as it stands (but for
the port), `python` as a program, or written to the file that its first line names. PAGES says what a page takes for
granted; a block that cannot be run here is in NOT_RUN, with the reason. A page or a block that is in neither fails.
"""

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests import shims

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PRELUDE = """
set -euo pipefail
trap 'jobs -p | xargs -r kill 2>/dev/null; wait' EXIT
curl() { command curl --fail --silent --show-error "$@"; }
patiently() {  # repeats a command until it succeeds
    local -
    set +x
    for _ in $(seq 600); do
        "$@" > /dev/null 2>&1 && return
        sleep 0.1
    done
    "$@"
}
listening() { patiently curl "http://127.0.0.1:$MAINSTEM_HTTP__PORT/readyz"; }
live() { patiently grep --fixed-strings "$(printf %06d "$1")" home/published/main/LATEST; }
"""
HOME = "mainstem init home --base my-model\n"
DAEMON = "mainstem run --home home &\nlistening\n"
RECEIVER = """
cat > receiver.py <<'THE END'
import os
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()

HTTPServer(("127.0.0.1", int(os.environ["MAINSTEM_HTTP__PORT"])), Handler).serve_forever()
THE END
python receiver.py &
patiently curl --data x http://127.0.0.1:8765/
cat >> home/mainstem.toml <<'THE END'
[[webhooks]]
url = "http://127.0.0.1:8765/"
allow_private = true
secret_file = "webhook-secret"
THE END
"""
MERGED = HOME + "cp -r my-finetune home/inbox/\nmainstem run --home home --once --no-http\n"


@dataclass(frozen=True)
class Page:
    """Shell commands: before the page's first block, after some of its lines, and what must hold at its end."""

    before: str = ""
    after: dict[str, str] = field(default_factory=dict)
    end: str = ""


PAGES = {
    "README.md": Page(
        after={
            "mainstem run --home home &": "listening",
            "cp -r my-finetune home/inbox/": "live 1",
        },
        end="cmp model.safetensors home/published/main/000001/model.safetensors\n"
        "cmp model/model.safetensors model.safetensors\nkill %1\nwait %1\n",
    ),
    "docs/trainers.md": Page(
        before=HOME + DAEMON,
        after={
            "mv home/inbox/german-lora.part home/inbox/german-lora": "live 2\ncp -r pickled home/inbox/reviews\n"
            "patiently mainstem show reviews --home home",
            "mainstem convert home/quarantine/*/reviews home/inbox/reviews": "live 3",
        },
        end='mainstem show reviews --home home | grep "^status *merged"\n'
        "mainstem show german --home home | grep -F main/0\nmainstem show german-lora --home home | grep -F main/0\n",
    ),
    "docs/cli.md": Page(before=MERGED),
    "docs/evaluation.md": Page(
        before=MERGED,
        after={
            "mainstem evaluate --home home": "mainstem show main/1 --home home | grep -F german",
            'mainstem rollback main/0 --reason "worse in German" --home home': "live 0",
            "mainstem promote main/1 --home home": "live 1",
        },
        end='grep -q "<h1>mainstem report" report.html\n',
    ),
    "docs/settings.md": Page(before=HOME),
    "docs/hooks.md": Page(before=HOME + RECEIVER, end="grep -F whsec_ home/webhook-secret\n"),
    "docs/study.md": Page(end="grep -q 'mainstem init HOME --base my-model' study/study.json\n"),
    "docs/operating.md": Page(
        before=HOME + DAEMON + "cp -r my-finetune home/inbox/\nlive 1\n",
        after={'mainstem rollback main/0 --reason "fails in German" --home home': "live 0"},
        end="listening\nkill -0 %1\nmainstem log --status withdrawn --home home | grep -F my-finetune\n",
    ),
    "docs/runbook.md": Page(before=HOME + DAEMON + "cp -r my-finetune home/inbox/\nlive 1\n"),
    "docs/methods.md": Page(end="test -e home2/published/soup/latest/config.json\n"),
    "docs/time.md": Page(
        after={"mainstem run --home digits &": "listening"},
        end="curl -s http://127.0.0.1:8765/v1/heads/main/versions/2/data | grep -F urn:digits:right\n"
        "mainstem show top_left --home digits | grep -F init/0\n"
        "mainstem show right --home digits | grep -F init/1\nkill %1\nwait %1\n",
    ),
    "docs/convert.md": Page(
        before=HOME + "cp -r pickled old-model\ncp pickled/pytorch_model.bin .\n",
        end="cmp home/inbox/french.safetensors french.safetensors\ntest -e home/inbox/old-model/config.json\n",
    ),
    "docs/http.md": Page(
        before=HOME
        + "export TOKEN=0123456789abcdef\n"
        + "cp my-finetune/model.safetensors legal-german.safetensors\ncp -r many/one legal-french\n"
        + 'export MAINSTEM_HTTP__WRITE_TOKEN="$TOKEN"\n'
        + DAEMON,
        end="live 2\n",
    ),
    "docs/pull.md": Page(
        before=HOME + DAEMON,
        end="cp -r my-finetune home/inbox/\nlive 1\n"
        "patiently cmp model/model.safetensors home/published/main/000001/model.safetensors\n",
    ),
    "docs/published.md": Page(
        before=MERGED, end="cmp models/000001/model.safetensors home/published/main/000001/model.safetensors\n"
    ),
    "docs/adamerging.md": Page(
        before=HOME + "cp -r my-finetune many/one home/inbox/\nmainstem run --home home --once --no-http\n",
        end="grep -q model.embed_tokens.weight home/published/ada/latest/adamerging.json\n",
    ),
    "docs/rebuild.md": Page(
        before=HOME + "cp -r many/* my-finetune home/inbox/\n" + "mainstem run --home home --once --no-http\n",
        end="live 5\ntest -e spectral/published/init/000004\ntest -e cleaned/published/main/000002\n",
    ),
    "docs/zipit.md": Page(
        before="for n in $(seq 20); do echo one two; done > texts.txt\n",
        end="cmp my-model/config.json zipped/config.json\ntest -e zipped/model.safetensors\n",
    ),
    "docs/serving-adapters.md": Page(
        before=HOME + "printf '[heads.main.adapter]\\nrank = 4\\n' >> home/mainstem.toml\n" + MERGED.removeprefix(HOME)
    ),
}

NOT_RUN = {
    ("README.md", "make demo"): ".ci/run runs it, and `make test-slow` what it runs",
    ("README.md", "pip install mainstem"): "needs an index that has it; tests/test_wheel.py installs the wheel",
    ("docs/http.md", "curl -sN http://127.0.0.1:8765/v1/events"): "it never ends; tests/daemon/http/ listens",
    ("docs/operating.md", "python3 -m venv /opt/mainstem"): "installs a service, as root; tests/deploy/ reads it",
    ("docs/operating.md", "docker build -f deploy/container/Dockerfile -t mainstem ."): "tests/deploy/ runs its steps",
    (
        "docs/operating.md",
        "kubectl apply -k deploy/kubernetes/init",
    ): "needs a cluster; tests/deploy/ builds what it sends",
    ("docs/published.md", 'vllm serve "$(realpath home/published/main/latest)"'): "vllm needs a GPU, and is not ours",
    ("docs/hub.md", "export HF_ENDPOINT=http://127.0.0.1:8765"): "tests/daemon/http/test_hub_clients.py runs it",
    ("docs/hub.md", "# load.py"): "tests/daemon/http/hub_client.py is that and more",
    ("docs/hub.md", "# push.py"): "tests/daemon/http/hub_client.py is that and more",
    (
        "docs/oci.md",
        "oras pull --plain-http 127.0.0.1:8765/mainstem/main:v12",
    ): "no index has the oras of Go; tests/daemon/http/test_oci.py pulls with Python's",
    ("docs/trainers.md", "# trainer.py"): "tests/daemon/http/hub_client.py is that and more",
    ("docs/trainers.md", "# trl_sft.py"): "TRL is not installed, and the page says that it was not run",
    ("docs/trainers.md", "mainstem pull http://127.0.0.1:8765 base --head init"): "likewise of axolotl",
    (
        "docs/sidecars.md",
        "from safetensors.torch import save_file",
    ): "a part of docs/examples/sidecars.py, which is run",
}

PAGES_WITH_BLOCKS = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if BLOCK.search(path.read_text())
]


def blocks(page: str) -> list[tuple[str, str]]:
    """(sh or python, text) of every fenced block of a page that a reader would run."""
    return [(kind, text) for kind, text in BLOCK.findall((ROOT / page).read_text()) if not listed(page, text)]


def listed(page: str, text: str) -> bool:
    return (page, text.splitlines()[0]) in NOT_RUN


def script(page: str) -> str:
    """The shell script that does what the page says."""
    given = PAGES[page]
    lines = [PRELUDE, given.before, "set -x"]
    for n, (kind, text) in enumerate(blocks(page)):
        if kind == "python":
            named = re.match(r"# (\w+\.py)\n", text)
            name = named[1] if named else f"block{n}.py"
            lines.append(f"cat > {name} <<'THE END'\n{text}THE END\n" + ("" if named else f"python {name}"))
            continue
        for line in text.splitlines():
            lines.append(f"{line} &" if line.endswith(" --watch") else line)
            lines.append(given.after.get(line, ""))
    return "\n".join([*lines, given.end])


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `mainstem` and `python`."""
    folder = tmp_path_factory.mktemp("tools")
    address = folder / "socket"
    shims.write(folder / "bin", address)
    server = shims.started(address, "transformers", "peft")
    try:
        yield folder / "bin"
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that the pages take for granted, each a real model with a tokenizer, and tiny."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    torch.manual_seed(0)
    shape = {"vocab_size": len(alphabet), "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    # longer than what is drawn for the fine-tunes, as trained weights are
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads, initializer_range=0.2))

    def save(name: str) -> Path:
        model.save_pretrained(folder / name)
        PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder / name)
        return folder / name

    def tune() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))

    save("my-model")
    tune()
    save("my-finetune")
    for name in ("many/one", "many/two", "many/badly-trained"):
        tune()
        save(name)
    tune()
    pickled = save("pickled")
    (pickled / "model.safetensors").unlink()
    weights = model.state_dict()
    torch.save(weights, pickled / "pytorch_model.bin")
    torch.save({"state_dict": {f"model.{name}": weights[name] for name in weights}}, folder / "last.ckpt")
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.skipif(shutil.which("curl") is None, reason="the pages fetch with curl, which is not installed")
@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS)
def test_what_a_page_says_can_be_done(page: str, tools: Path, models: Path, tmp_path: Path) -> None:
    if not blocks(page):
        assert page not in PAGES, f"{page} has nothing to run"
        return
    assert page in PAGES, f"{page} has blocks to run: give it an entry in PAGES, or list each in NOT_RUN with a reason"
    for line in PAGES[page].after:
        assert any(line in text.splitlines() for _, text in blocks(page)), f"{page} has no line {line}"
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    port = str(free_port())
    environment = {
        "PATH": f"{tools}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "MAINSTEM_HTTP__PORT": port,
        "MAINSTEM_INBOX__SETTLE_SECONDS": "0.2",
        "MAINSTEM_INBOX__SCAN_SECONDS": "0.2",
        "MAINSTEM_INBOX__PATIENCE_SECONDS": "2",
    }
    done = subprocess.run(
        ["bash", "-c", script(page).replace("127.0.0.1:8765", f"127.0.0.1:{port}")],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]


def test_what_is_not_run_is_there_and_has_a_reason() -> None:
    for (page, line), reason in NOT_RUN.items():
        firsts = [text.splitlines()[0] for _, text in BLOCK.findall((ROOT / page).read_text())]
        assert line in firsts and reason, f"{page} has no block that begins with {line}"
    assert set(PAGES) <= set(PAGES_WITH_BLOCKS)
