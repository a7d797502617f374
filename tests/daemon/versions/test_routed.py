"""`mainstem export`: what it writes is loaded by the real transformers, and routes by the authors' rule."""

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.config import Publish
from daemon.errors import BadConfig, BadHome, DaemonError
from daemon.layout import STATE_FILE, Home
from daemon.notation import find_version
from daemon.versions.routed import Exported, export
from registry.reader import Reader
from tests import shims
from tests.daemon.homes import drain, make_home, put
from tests.daemon.processes import environment, forked, forked_each, preloaded, until
from tests.jsons import described, documented
from tests.models import read_weights, write_base, write_expert
from tests.oracles import smile as oracle
from tests.oracles.rules import task_vector

os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported

pytestmark = [
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed"),
    pytest.mark.filterwarnings("ignore:::(transformers|peft)"),  # the library's own
]

WEIGHTS = "model.safetensors"
PARAMS = {"cap": 3, "rank": 4, "gate_rank": 3, "top_k": 2}
RULE = {key: PARAMS[key] for key in ("rank", "gate_rank", "top_k")}
IDS = torch.tensor([[5, 9, 2, 7, 11, 3], [1, 8, 8, 4, 12, 30]])


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=0, eos_token_id=39)
    )


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=24, max_position_embeddings=24, bos_token_id=0, eos_token_id=39,
        )
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "bert": (bert, "AutoModelForMaskedLM"),
    "gpt2": (gpt2, "AutoModelForCausalLM"),
    "llama": (llama, "AutoModelForCausalLM"),
}


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library copies code that it is to trust to a folder of its own, and puts that into the path.

    Such small models only lose by threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    yield
    torch.set_num_threads(threads)


def founded(root: Path, kind: str) -> Home:
    """A home of smile over a tiny random model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[kind][0]()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(root / "base")
    return make_home(root / "home", root / "base", [("main", "smile", PARAMS)])


def merged(home: Home, *seeds: int) -> None:
    """More experts, one after the other."""
    base = load_file(home.base / WEIGHTS)
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        expert = {name: x + 0.1 * torch.randn(x.shape, generator=draw) for name, x in base.items()}
        save_file(expert, home.inbox / f"expert-{seed}.safetensors", metadata={"format": "pt"})
    drain(home)


def weights_of(home: Home) -> list[dict[str, Tensor]]:
    """The base's, and each expert's in the order in which they were merged."""
    with Reader.open(home.registry) as reader:
        paths = [home.archived(expert.id) for expert in reader.lineage()]
    return [load_file(path) for path in (home.base / WEIGHTS, *paths) if path]


def exported(home: Home, out: Path, words: str = "main", **publish: Any) -> Exported:
    with Reader.open(home.registry) as reader:
        return export(home, reader, find_version(reader, words), out, Publish(**publish))


def load(folder: Path, auto: str, trust_remote_code: bool = True, **kwargs: Any) -> Any:
    import transformers

    found = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=trust_remote_code, **kwargs)
    return found.eval()


def by_the_rule(kind: str, weights: Sequence[Mapping[str, Tensor]]) -> Any:
    """The ordinary model in float64, given the authors' rule by hand. weights: the base's, and each expert's."""
    base, *experts = weights
    apart, evicted = experts[-PARAMS["cap"] :], experts[: -PARAMS["cap"]]
    beneath = {name: x.double() for name, x in base.items()}
    for expert in evicted:
        for name, tau in task_vector(base, expert).items():
            beneath[name] += (oracle.cut(tau, PARAMS["rank"]) if oracle.is_layers(name, tau) else tau.double()) / len(
                experts
            )
    model = MODELS[kind][0]().double()
    model.load_state_dict(base, strict=False)
    model.tie_weights()
    oracle.route_all(model.eval(), [task_vector(base, expert) for expert in apart], RULE, beneath)
    return model


@pytest.mark.parametrize("kind", ["bert", "gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_the_exported_model_routes_by_the_authors_rule(kind: str, tmp_path: Path) -> None:
    """Also where experts had to make room. It generates, and what it saves loads again."""
    home, auto = founded(tmp_path, kind), MODELS[kind][1]
    with torch.inference_mode():
        untouched = load(tmp_path / "base", auto, dtype=torch.float64)(input_ids=IDS).logits
    for seeds, evicted in (((1, 2), 0), ((3, 4, 5), 2)):
        merged(home, *seeds)
        done = exported(home, tmp_path / f"{evicted}")
        assert (done.version, done.evicted) == (f"main/{seeds[-1]}", evicted)
        assert done.experts == [f"expert-{n}.safetensors" for n in range(evicted + 1, seeds[-1] + 1)]
        model = load(tmp_path / f"{evicted}", auto, dtype=torch.float64)
        with torch.inference_mode():
            found, truth = model(input_ids=IDS).logits, by_the_rule(kind, weights_of(home))(input_ids=IDS).logits
        error = float((found - truth).norm() / (truth - untouched).norm())
        print(f"{kind}, {evicted} of {seeds[-1]} experts beneath: {error:.1e} of what they change")
        assert error <= 1e-5
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", auto, dtype=torch.float64)
    with torch.inference_mode():
        assert torch.equal(again(input_ids=IDS).logits, found)
    if kind != "bert":
        said = load(tmp_path / "2", auto).generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert said.shape == (1, IDS.shape[1] + 6) or int(said[0, -1]) == 39


def test_a_model_without_its_head_is_routed_too_and_nobody_takes_it_for_the_base(tmp_path: Path) -> None:
    """The file's names begin with "bert.", the model's do not."""
    home = founded(tmp_path, "bert")
    merged(home, 1, 2)
    exported(home, tmp_path / "routed", dtype="bfloat16", shard_bytes=8000)
    assert len([*(tmp_path / "routed").glob("model-*.safetensors")]) > 1
    whole, part = (load(tmp_path / "routed", auto) for auto in ("AutoModelForMaskedLM", "AutoModel"))
    assert part.dtype == torch.bfloat16 and part.encoder.layer[1].output.dense.experts_s.any()
    with torch.inference_mode():
        assert torch.equal(part(input_ids=IDS).last_hidden_state, whole.bert(input_ids=IDS).last_hidden_state)
    for auto in ("AutoModel", "AutoConfig"):
        with pytest.raises(ValueError, match="trust_remote_code"):
            load(tmp_path / "routed", auto, trust_remote_code=False)


def tiny(root: Path, method: str = "smile", params: Mapping[str, Any] = PARAMS, *seeds: int) -> Home:
    """A home over a model that transformers does not know: what is written is the same."""
    home = make_home(root / "home", write_base(root / "base", seed=1), [("main", method, params)])
    (home.base / "tokenizer.json").write_text("{}")
    for seed in seeds:
        put(home, write_expert(root / f"{seed}.safetensors", home.base, seed))
    if seeds:
        drain(home)
    return home


def test_a_folder_has_all_of_a_model_and_the_command_says_what_it_made(tmp_path: Path) -> None:
    home, out = tiny(tmp_path, "smile", PARAMS, 2, 3, 4, 5), tmp_path / "routed"
    lines = [("export", "main", out), ("export", "main", tmp_path / "j", "--json")]
    done, listed = forked_each([(*words, "--home", home.root) for words in lines])
    assert done.returncode == 0, done.stderr
    said = json.loads(listed.stdout)
    assert described(said) == documented()["export VERSION OUT"]
    assert said["size_bytes"] == sum(path.stat().st_size for path in (tmp_path / "j").iterdir())
    assert "main/4 as " in done.stdout and "6 layers choose among 3.safetensors, 4.safetensors" in done.stdout
    assert "and 1 earlier beneath" in done.stdout
    there = {path.name for path in out.iterdir()}
    assert there == {"README.md", "config.json", "model.safetensors", "modeling_smile.py", "tokenizer.json"}
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "mainstem_smile" and config["hidden_size"] == 16
    assert config["smile"]["names"] == [f"{n}.safetensors" for n in (3, 4, 5)]
    base, found = read_weights(home.base), read_weights(out)
    for name in ("embed_tokens.weight", "layers.1.norm.weight", "position_ids"):
        assert torch.equal(found[name], base[name])
    assert found["layers.0.up.experts_left"].shape == (3, 4, 32)
    assert "And 1 earlier one" in (out / "README.md").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_export_leaves_nothing_says_so_and_ends_as_every_command_does(
    tmp_path: Path, number: signal.Signals
) -> None:
    home, out = tiny(tmp_path, "smile", PARAMS, 2), tmp_path / "there" / "routed"
    out.parent.mkdir()
    words = ["export", "main", str(out), "--home", str(home.root)]
    waits = environment({"MAINSTEM_FAILPOINT": "file.create=hang"})
    with Path(os.devnull).open("wb") as nothing, (tmp_path / "said").open("wb") as said:
        process = shims.Process(preloaded(), words, waits, tmp_path, nothing.fileno(), said.fileno())
        assert until(lambda: os.listdir(out.parent), 60)
        process.send_signal(number)
        assert process.wait(30) == 128 + number
    assert not os.listdir(out.parent)
    ending = (tmp_path / "said").read_text()
    assert "mainstem: interrupted; nothing was made, and the same command begins anew\n" in ending


def test_an_export_that_is_stopped_once_it_is_there_does_not_say_that_nothing_was_made(tmp_path: Path) -> None:
    home, out = tiny(tmp_path, "smile", PARAMS, 2), tmp_path / "routed"
    words = ["export", "main", str(out), "--home", str(home.root)]
    waits = environment({"MAINSTEM_FAILPOINT": "folder.sync=hang"})  # that of the folder which it came to be in
    with Path(os.devnull).open("wb") as nothing, (tmp_path / "said").open("wb") as said:
        process = shims.Process(preloaded(), words, waits, tmp_path, nothing.fileno(), said.fileno())
        assert until(out.exists, 60)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 128 + signal.SIGINT
    assert (tmp_path / "said").read_text() == f"mainstem: interrupted; {out} is there\n"


def test_an_expert_that_was_taken_out_is_nowhere(tmp_path: Path) -> None:
    """One that was evicted, and one that was apart: the archive is merged again."""
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    home = tiny(tmp_path / "with", "smile", PARAMS, 2, 3, 4, 5, 6)
    assert forked("rebuild", "--home", home.root, "--without", "2", "--without", "4").returncode == 0
    never = tiny(tmp_path / "without", "smile", PARAMS, 2, 4, 6)
    for one, out in ((home, "ours"), (never, "theirs")):
        exported(one, tmp_path / out)
    ours, theirs = read_weights(tmp_path / "ours"), read_weights(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    kept = json.loads((tmp_path / "ours" / "config.json").read_text())["smile"]["names"]
    assert kept == ["2.safetensors", "4.safetensors", "6.safetensors"]


def refused(home: Home, out: Path, words: str = "main", error: type[DaemonError] = BadHome) -> DaemonError:
    with pytest.raises(error) as found:
        exported(home, out, words)
    assert not [*home.root.parent.glob("*.tmp")]
    return found.value


def test_what_cannot_be_exported_is_refused_with_what_to_do(tmp_path: Path) -> None:
    home, out = tiny(tmp_path, "mean", {}, 2), tmp_path / "routed"
    error = refused(home, out)
    assert "its method is mean" in str(error)
    [hint] = re.findall(r"`mainstem (.*?)`", error.hint)
    assert forked(*hint.split(), "--home", home.root).returncode == 0
    assert exported(home, out, "smile").experts == ["2.safetensors"]
    assert "is there already" in str(refused(home, out, "smile", BadConfig))
    assert "does not exist" in str(refused(home, tmp_path / "no" / "where", "smile", BadConfig))
    assert "no expert to route to" in str(refused(home, tmp_path / "new", "smile/0"))
    state = home.head_state("smile", 1) / STATE_FILE
    state.rename(tmp_path / "away")
    assert "the state of smile/1 is gone" in str(refused(home, tmp_path / "new", "smile"))
    (tmp_path / "away").rename(state)
    for text, said in (("[1]", "no JSON object"), ("{}", "no model_type")):
        (home.base / "config.json").write_text(text)
        assert said in str(refused(home, tmp_path / "new", "smile"))
    (home.base / "config.json").unlink()
    assert "no config.json" in str(refused(home, tmp_path / "new", "smile"))


def test_a_head_that_leaves_no_matrix_has_nothing_to_route(tmp_path: Path) -> None:
    home = tiny(tmp_path, "smile", {"exclude": "*"}, 2)
    assert "no matrix" in str(refused(home, tmp_path / "routed"))


def test_what_the_library_cannot_route_is_said(tmp_path: Path) -> None:
    """No layer at all is an error; of some, the others go on."""
    home = founded(tmp_path, "gpt2")
    merged(home, 1)
    exported(home, tmp_path / "routed")
    path = tmp_path / "routed" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "smile": {**config["smile"], "layers": ["transformer.wte"]}}))
    with pytest.raises(ValueError, match=r"no layer of GPT2LMHeadModel is routed: transformer\.wte"):
        load(tmp_path / "routed", "AutoModelForCausalLM")
    path.write_text(json.dumps({**config, "smile": {**config["smile"], "model_type": "unheard_of"}}))
    with pytest.raises(ValueError, match="no model of the type 'unheard_of'"):
        load(tmp_path / "routed", "AutoModelForCausalLM")
