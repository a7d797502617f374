"""`mainstem convert`: every bit arrives, what is left out is said, what cannot be written is named.

Nothing stays behind when it fails.
"""

import json
import os
import signal
import subprocess
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from daemon.checkpoints.checkpoint import open_path
from daemon.convert import unpickling
from daemon.convert.confining import Options
from daemon.convert.converting import Converted, convert
from daemon.errors import BadConfig, NotYet, Refused
from daemon.layout import Home
from tests import shims
from tests.daemon.convert.bits import equal
from tests.daemon.homes import drain
from tests.daemon.processes import ended, environment, forked, preloaded, until
from tests.jsons import described, documented
from tests.models import read_weights, write_expert


def odd_tensors() -> dict[str, Tensor]:
    """What a state dict may well hold: every dtype we write, 0-d, empty, strided, tied and overlapping tensors."""
    draw = torch.Generator().manual_seed(7)
    big = torch.randn(40, 12, generator=draw)
    floats = {str(d): torch.randn(3, 5, generator=draw).to(d) for d in (torch.float64, torch.float16, torch.bfloat16)}
    whole = {str(d): torch.arange(5, dtype=d) for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)}
    return {
        **floats,
        **whole,
        "flags": torch.tensor([True, False, True]),
        "step": torch.tensor(41),
        "scale": torch.tensor(0.25),
        "empty": torch.empty(0, 3),
        "embed": big,
        "head": big,
        "transposed": torch.randn(4, 6, generator=draw).t(),
        "column": big[:, 3],
        "rows": big[10:20],
        "expanded": torch.tensor([[1.5, -2.0]]).expand(3, 2),
        "odd values": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


def unpickled(
    folder: Path, value: Any, key: str | None = None, prefix: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The work of the process, done in this one: (the tensors written, its report)."""
    torch.save(value, folder / "value.pt")
    source = os.open(folder / "value.pt", os.O_RDONLY)
    target = os.open(folder / "value.safetensors", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        job = unpickling.Job(0, source, target, 1 << 30, 1 << 24, 60, key, prefix)
        report = unpickling.convert(job, lambda *_: None)
    finally:
        os.close(target)
    return load_file(folder / "value.safetensors"), report


def refusal(folder: Path, value: Any, key: str | None = None, prefix: str = "") -> Refused:
    with pytest.raises(Refused) as caught:
        unpickled(folder, value, key, prefix)
    return caught.value


# Whole, through the process


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Converted, list[tuple[str, int, int]]]:
    """A file with every odd tensor, converted."""
    folder = tmp_path_factory.mktemp("odd")
    optimizer = {"state": {0: {"exp_avg": torch.zeros(8)}}, "param_groups": [{"lr": 0.1}]}
    pickled = {"epoch": 3, "state_dict": OrderedDict(odd_tensors(), extra=None), "optimizer_states": [optimizer]}
    torch.save(pickled, folder / "last.ckpt")
    heard: list[tuple[str, int, int]] = []
    report = convert(folder / "last.ckpt", folder / "last.safetensors", report=lambda *said: heard.append(said))
    return folder, report, heard


def test_every_bit_arrives(odd: tuple[Path, Converted, Any]) -> None:
    folder, report, _ = odd
    found = load_file(folder / "last.safetensors")
    assert equal(found, odd_tensors())
    assert sorted(os.listdir(folder)) == ["last.ckpt", "last.safetensors"]
    assert (folder / "last.safetensors").stat().st_mode & 0o777 == 0o644
    with open_path(folder / "last.safetensors") as opened:
        assert opened.identity() == report.sha256


def test_the_report_says_what_was_done(odd: tuple[Path, Converted, Any]) -> None:
    _, report, heard = odd
    tensors = odd_tensors()
    assert report.tensors == len(tensors) and report.dtypes["float32"] == 9 and report.dtypes["bool"] == 1
    assert report.size_bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    assert report.inside == "state_dict" and report.stripped == 0 and report.copied == []
    assert {"names": ["embed", "head"], "identical": True} in report.shared
    assert {"names": ["embed", "column", "rows"], "identical": False} in report.shared
    left_out = {entry["name"]: entry["what"] for entry in report.left_out}
    assert left_out == {
        "epoch": "3",
        "optimizer_states": "a list of 1, in which 1 tensors of 32 bytes",
        "state_dict/extra": "None",
    }
    assert report.files[0]["kind"] == "zip" and report.seconds > 0
    assert heard[0] == ("last.ckpt", 0, 0)
    assert heard[-1][1] > 0 and heard[-1][2] >= heard[-1][1] >= heard[1][1]


@pytest.mark.usefixtures("no_process")
def test_the_old_format_of_torch_is_read_too(tmp_path: Path) -> None:
    torch.save(odd_tensors(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    report = convert(tmp_path / "old.bin", tmp_path / "folder")
    assert report.files[0]["kind"] == "legacy"
    assert equal(load_file(tmp_path / "folder/model.safetensors"), odd_tensors())
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o755


@pytest.mark.usefixtures("no_process")
def test_a_converted_expert_is_merged(home: Home, base: Path, tmp_path: Path) -> None:
    """Straight into the inbox: the unfinished one has a name that the daemon leaves alone."""
    expert = write_expert(tmp_path / "expert.safetensors", base, seed=3)
    torch.save({"model": read_weights(expert)}, tmp_path / "expert.pt")
    convert(tmp_path / "expert.pt", home.inbox / "expert.safetensors")
    drain(home)
    merged = read_weights(home.version("main", 1))
    assert all(torch.allclose(merged[name], tensor) for name, tensor in read_weights(expert).items())


# Folders


@pytest.mark.usefixtures("no_process")
def test_a_model_with_tied_weights_loads_as_before(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    source = tmp_path / "source"
    model.config.save_pretrained(source)
    (source / "tokenizer.json").write_text("{}")
    (source / "training_args.bin").write_bytes(b"\x80\x04 not looked at")
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    report = convert(source, tmp_path / "out")
    assert {"names": ["transformer.wte.weight", "lm_head.weight"], "identical": True} in report.shared
    assert report.copied == ["config.json", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert equal(load_file(tmp_path / "out/model.safetensors"), dict(model.state_dict()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    words = torch.arange(10).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(words).logits, model(words).logits)


@pytest.mark.usefixtures("no_process")
def test_an_old_adapter_keeps_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/adapter_config.json").write_text('{"peft_type": "LORA"}')
    torch.save({"base_model.model.up.lora_A.weight": torch.ones(2, 4)}, tmp_path / "in/adapter_model.bin")
    convert(tmp_path / "in", tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["adapter_config.json", "adapter_model.safetensors"]


# What is found in a pickle


@pytest.mark.parametrize("path", ["", "state_dict", "model_state_dict", "model", "module", "model/state_dict"])
def test_weights_are_found_where_trainers_put_them(path: str, tmp_path: Path) -> None:
    weights: Any = {"w": torch.ones(2), "count": torch.tensor(3)}
    pickled = weights
    for name in reversed(path.split("/") if path else []):
        pickled = {name: pickled, "step": torch.tensor(5), "note": "x"}
    found, report = unpickled(tmp_path, pickled)
    assert equal(found, weights) and report["inside"] == path
    assert len(report["left_out"]) == 2 * (path.count("/") + bool(path))


def test_the_person_chooses_where_the_pickle_does_not_say(tmp_path: Path) -> None:
    pickled = {"ema": {"params": {"w": torch.ones(2)}}, "live": {"w": torch.zeros(2)}, "iteration": 9}
    error = refusal(tmp_path, pickled)
    assert error.reason == "no_weights" and "ema, live, iteration" in error.hint and "--key" in error.hint
    found, report = unpickled(tmp_path, pickled, key="ema/params")
    assert equal(found, {"w": torch.ones(2)}) and report["inside"] == "ema/params"
    assert [entry["name"] for entry in report["left_out"]] == ["live", "iteration"]
    assert "it has no teacher" in str(refusal(tmp_path, pickled, key="teacher"))
    both = {"state_dict": {"w": torch.ones(2)}, "model": {"w": torch.zeros(2)}}
    assert "state_dict, model" in str(refusal(tmp_path, both))
    assert equal(unpickled(tmp_path, both, key="model")[0], both["model"])


@pytest.mark.usefixtures("no_process")
def test_a_prefix_goes_only_when_asked(tmp_path: Path) -> None:
    weights = {"module.a": torch.ones(1), "module.b": torch.ones(2), "c": torch.ones(3)}
    assert equal(unpickled(tmp_path, weights)[0], weights)
    found, report = unpickled(tmp_path, weights, prefix="module.")
    assert {name: len(tensor) for name, tensor in found.items()} == {"a": 1, "b": 2, "c": 3}
    assert report["stripped"] == 2
    clash = {"module.a": torch.ones(1), "a": torch.ones(1)}
    assert "another's name" in str(refusal(tmp_path, clash, prefix="module."))
    torch.save(weights, tmp_path / "w.pt")
    with pytest.raises(Refused, match="no tensor's name begins with model"):
        convert(tmp_path / "w.pt", tmp_path / "w.safetensors", Options(strip_prefix="model."))
    assert not (tmp_path / "w.safetensors").exists()


def quantised() -> Tensor:
    return torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: torch.ones(2, dtype=torch.complex64), "complex64"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.ones(2, dtype=torch.uint16), "uint16"),
        (quantised, "quantised, qint8"),
        (lambda: torch.eye(3).to_sparse(), "sparse, sparse_coo"),
        (lambda: torch.eye(3).to_sparse_csr(), "sparse, sparse_csr"),
        (lambda: torch.ones(2, device="meta"), "without values, on the device meta"),
    ],
    ids=["complex", "float8", "uint16", "quantised", "sparse", "csr", "meta"],
)
def test_what_cannot_be_written_is_named(make: Callable[[], Tensor], said: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of these kinds are beta or on their way out
        error = refusal(tmp_path, {"good": torch.ones(2), "layers.3.odd": make()})
    assert error.reason == "unsupported_dtype"
    assert f"1 tensors cannot be converted: layers.3.odd ({said})" in str(error)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ({}, "no_weights"),
        ([torch.ones(2)], "no_weights"),
        (torch.ones(2), "no_weights"),
        (3, "no_weights"),
        ({"epoch": 3}, "no_weights"),
        ({"state_dict": {}}, "no_weights"),
        ({"model": {"encoder": {"w": torch.ones(2)}}}, "no_weights"),
        ({0: torch.ones(2)}, "convert"),
        ({"": torch.ones(2)}, "convert"),
        ({"a\nb": torch.ones(2)}, "convert"),
        ({"__metadata__": torch.ones(2)}, "convert"),
    ],
    ids=repr,
)
def test_what_is_no_state_dict_is_refused(value: Any, reason: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, value).reason == reason


# Where it comes from and goes to


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_what_exists_is_never_replaced(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "file.safetensors").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link.safetensors").symlink_to("nowhere")
    for name in ("file.safetensors", "folder", "link.safetensors"):
        with pytest.raises(BadConfig, match="is there already"):
            convert(pickled, tmp_path / name)
    assert (tmp_path / "file.safetensors").read_bytes() == b"mine"
    with pytest.raises(BadConfig, match="does not exist"):
        convert(pickled, tmp_path / "none/out.safetensors")
    for name in ("file.safetensors", "link.safetensors"):
        with pytest.raises(BadConfig, match=rf"/{name} is no folder"):  # nor would `mkdir -p` make one
            convert(pickled, tmp_path / name / "none/out.safetensors")
    with pytest.raises(BadConfig, match="would be a folder"):
        convert(pickled, tmp_path / "out.bin")


@pytest.mark.usefixtures("no_process")
def test_links_are_followed_as_in_the_cache_of_the_hub(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "link.pt").symlink_to(pickled.name)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/pytorch_model.bin").symlink_to(Path("..") / pickled.name)
    assert convert(tmp_path / "link.pt", tmp_path / "file.safetensors").files
    assert convert(tmp_path / "linked", tmp_path / "folder").files
    one, other = tmp_path / "file.safetensors", tmp_path / "folder/model.safetensors"
    assert one.read_bytes() == other.read_bytes()


def test_only_plain_files_are_opened(pickled: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "folder").mkdir()
    (tmp_path / "safe").mkdir()
    (tmp_path / "safe/model.safetensors").write_bytes(b"")
    (tmp_path / "dangling.pt").symlink_to("nowhere")
    for name, reason in (
        ("fifo.pt", "not_a_file"),
        ("folder", "no_weights"),
        ("safe", "convert"),
        ("dangling.pt", "changed"),
        ("missing.pt", "convert"),
    ):
        with pytest.raises((Refused, NotYet)) as caught:
            convert(tmp_path / name, tmp_path / "out")
        assert caught.value.reason == reason, name
    assert not (tmp_path / "out").exists()


# The command


def test_the_command(tmp_path: Path) -> None:
    tied = torch.ones(2, 2)
    torch.save({"model": {"module.a": tied, "module.b": tied}, "epoch": 4}, tmp_path / "w.pt")
    done = forked("convert", "w.pt", "w.safetensors", "--strip-prefix", "module.", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in (
        "2 tensors, 32 B (2 float32) in",
        "found under model",
        "tied: a = b",
        "left out: epoch: 4",
        "2 names are shorter by the prefix",
        "sha256 ",
    ):
        assert line in done.stdout
    again = forked("convert", "w.pt", "w.safetensors", cwd=tmp_path)
    assert again.returncode == 1 and "is there already" in again.stderr and "hint:" in again.stderr
    done = forked("convert", "w.pt", "out", "--memory", "700MB", "--timeout", "200", "--json", cwd=tmp_path)
    report = json.loads(done.stdout)
    assert described(report) == documented()["convert"]
    assert report["inside"] == "model" and report["files"][0]["name"] == "model.safetensors"
    assert forked("convert", "w.pt", "other", "--memory", "much", cwd=tmp_path).returncode == 2
    done = forked("convert", "w.pt", "other", "--memory", "1MB", cwd=tmp_path)
    assert done.returncode == 1 and "16777216 are the least" in done.stderr and "--memory" in done.stderr


@pytest.mark.parametrize(
    ("number", "statuses"),
    [(signal.SIGINT, (1, 130)), (signal.SIGTERM, (143,)), (signal.SIGKILL, (-9,))],
    ids=["ctrl-c", "terminate", "kill"],
)
def test_a_stopped_command_leaves_no_process_and_no_weights(
    pickled: Path, tmp_path: Path, number: signal.Signals, statuses: tuple[int, ...]
) -> None:
    words = ["convert", str(pickled), str(tmp_path / "out.safetensors")]
    with Path(os.devnull).open("wb") as nothing:
        process = shims.Process(preloaded(), words, environment(), tmp_path, nothing.fileno(), nothing.fileno())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    found = until(lambda: children.read_text().split(), 60)
    assert found
    process.send_signal(number)
    assert process.wait(30) in statuses
    assert until(lambda: ended(int(found[0])), 60)
    left = [name for name in os.listdir(tmp_path) if name != "w.pt"]
    if number == signal.SIGKILL:  # the name of what it leaves says that it is unfinished
        assert len(left) == 1 and left[0].startswith(".out.safetensors.") and left[0].endswith(".tmp")
        convert(pickled, tmp_path / "out.safetensors")
        assert sorted(os.listdir(tmp_path)) == ["out.safetensors", "w.pt"]
    else:
        assert not left


def test_what_another_run_made_meanwhile_stays_and_is_named(pickled: Path, tmp_path: Path) -> None:
    """Two at once on one OUT; the hint followed, the second ends well."""
    out = tmp_path / "it is" / "out.safetensors"
    out.parent.mkdir()

    def another(*_: object) -> None:
        out.write_bytes(b"of another run")

    with pytest.raises(BadConfig, match="has come to be meanwhile, by another run or by hand: it stays") as caught:
        convert(pickled, out, report=another)
    assert out.read_bytes() == b"of another run" and os.listdir(out.parent) == [out.name]
    subprocess.run(["sh", "-c", caught.value.hint.partition("(")[2].partition(")")[0]], check=True)
    convert(pickled, out)


def test_time_is_limited(pickled: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(Refused, match=r"took longer than 0\.2 s") as caught:
        convert(pickled, tmp_path / "out.safetensors", Options(seconds=0.2))
    assert time.monotonic() - started < 5 and "--timeout" in caught.value.hint
    assert os.listdir(tmp_path) == ["w.pt"]
