"""What a version's folder holds and what it promises: everything that loaders need, a card, one set of modes, no change
after its rename; and that the real libraries load it.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from daemon.disk import durable
from daemon.errors import BadHome
from daemon.home.founding import name_of
from daemon.home.recovery import recover
from daemon.home.verification import verify
from daemon.layout import Home
from daemon.rebuild.commands import add_head, into
from daemon.rebuild.replay import Console
from daemon.versions import sealing
from daemon.versions.checking import entry
from daemon.versions.companions import companions
from daemon.versions.latest import point_latest
from daemon.versions.retention import collect
from daemon.versions.sealing import origin
from projector.methods import make
from registry.store import Store
from tests.daemon.homes import drain, experts, lineage, live, make_home, put, quick, tree
from tests.daemon.rebuilds import taken_out
from tests.models import write_base, write_expert

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries are imported

WANTED = [
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "LICENSE",
    "additional_chat_templates/tool_use.jinja",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "modules.json",
    "preprocessor_config.json",
    "sentence_bert_config.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
]
UNWANTED = [
    "adapter_config.json",
    "modeling_custom.py",
    "optimizer.pt",
    "pytorch_model.bin",
    "2_Dense/pytorch_model.bin",
    "checkpoint-5/config.json",
    "onnx/model.onnx",
    "additional_chat_templates/run.py",
]
LICENSED = "---\nlanguage: de\nlicense: apache-2.0\n---\n# The base's own card\n"


@pytest.fixture
def rich(tmp_path: Path) -> Path:
    """A base in a folder, with files of every kind beside its weights, all of them for their owner alone."""
    base = write_base(tmp_path / "rich", seed=1)
    for name in [*WANTED, *UNWANTED]:
        (base / name).parent.mkdir(exist_ok=True)
        if name != "config.json":
            (base / name).write_text(f"{name}\n")
    (base / "README.md").write_text(LICENSED)
    for path in base.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    return base


@pytest.fixture
def secretive() -> Iterator[None]:
    """A umask that would hide everything from everybody else."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def merge(home: Home, base: Path, *seeds: int, **settings: dict[str, object]) -> None:
    for seed in seeds:
        put(home, write_expert(home.root.parent / "e.safetensors", base, seed), f"{seed}.safetensors")
        drain(home, quick(**settings))


def card(home: Home, number: int, head: str = "main") -> str:
    return (home.version(head, number) / "README.md").read_text()


def sound(home: Home) -> list[str]:
    with lineage(home) as reader:
        return verify(home, reader, lambda what: None)[1]


def test_a_version_has_what_loaders_need_and_lists_it(rich: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", rich)
    merge(home, rich, 2)
    for number in (0, 1):
        folder = home.version("main", number)
        listed = json.loads(home.manifest("main", number).read_bytes())["files"]
        assert [file["name"] for file in listed] == sorted([*WANTED, "README.md", "model.safetensors"])
        for file in listed:
            path = folder / file["name"]
            assert entry(path, file["name"]).sha256 == file["sha256"] and path.stat().st_size == file["size"]
            if file["name"] in WANTED:
                assert path.read_bytes() == (rich / file["name"]).read_bytes()
        on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        assert on_disk == {*(file["name"] for file in listed), "manifest.json"}
    assert sound(home) == []


def test_what_lies_in_a_folder_below_is_verified_too(rich: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", rich)
    merge(home, rich, 2)
    folder = home.version("main", 1)
    (folder / "1_Pooling" / "config.json").write_text("1_Pooling/config.jsoN\n")
    (folder / "1_Pooling" / "stray").touch()
    (folder / "empty").mkdir()
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes().replace(b"merged", b"marged", 1))
    assert sorted(sound(home)) == [
        "published/main/000001/1_Pooling/config.json: its sha256 is not the manifest's",
        "published/main/000001/1_Pooling/stray: not in the manifest",
        "published/main/000001/README.md: its sha256 is not the manifest's",
        "published/main/000001/empty: not in the manifest",
    ]


def test_companions_are_files_with_plain_names(tmp_path: Path) -> None:
    for name in ("tokenizer", "1_Pooling", "additional_chat_templates"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "tokenizer.json")
    (tmp_path / "vocab\x1b.txt").touch()
    (tmp_path / "1_Pooling" / "nested").mkdir()
    (tmp_path / "1_Pooling" / "config.json").mkdir()
    (tmp_path / "additional_chat_templates" / "a\n.jinja").touch()
    assert companions(tmp_path).files == []


@pytest.mark.usefixtures("secretive")
def test_everybody_can_read_what_is_published_whatever_the_umask(rich: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", rich, [("main", "mean", {}), ("soup", "opcm", {})])
    merge(home, rich, 2, publish={"shard_bytes": 4000})
    merge(home, rich, 3, retention={"versions": 1, "grace_seconds": 0})
    taken_out(home, quick(), "3.safetensors")
    assert live(home) == 3
    seen = [home.published, *home.published.rglob("*")]
    assert len(seen) > 60
    for path in seen:
        if not path.is_symlink():
            assert path.stat().st_mode & 0o7777 == (0o755 if path.is_dir() else 0o644), path


def test_every_version_has_a_card_with_the_bases_license(rich: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", rich, [("main", "opcm", {"alpha": 0.25}), ("soup", "mean", {})])
    put(home, write_expert(tmp_path / "e.safetensors", rich, 2), "<b>|first.safetensors")
    (tmp_path / "second").mkdir()
    write_expert(tmp_path / "second" / "model.safetensors", rich, 3)
    (tmp_path / "second" / "expert.json").write_text('{"weight": 2.5}')
    drain(home)
    put(home, tmp_path / "second")
    drain(home)
    merged = experts(home)
    for head, number in [("main", 0), ("main", 1), ("main", 2), ("soup", 2)]:
        text = card(home, number, head)
        data = ModelCard(text).data.to_dict()
        assert (data["license"], data["base_model"]) == ("apache-2.0", "rich")
        assert data["tags"] == (["merge", "mainstem"] if number else ["mainstem"])
        assert [one.sha256 for one in merged if str(one.sha256) in text] == [one.sha256 for one in merged[:number]]
        assert text.startswith("---\n") and f"{head}/{number}\n" in text
    assert "This is the base itself" in card(home, 0)
    assert "| 2 | second | 2.5 |" in card(home, 2) and "| alpha | `0.25` |" in card(home, 2)
    assert "<b>" not in card(home, 2) and "&#60;b&#62;&#124;first.safetensors" in card(home, 2)
    assert "The base's own card" not in card(home, 0)
    figures = json.loads(home.manifest("main", 2).read_bytes())["figures"]
    assert f"| lambda | {figures['lambda']:.6g} |" in card(home, 2)


def test_the_card_is_the_same_in_another_home(base: Path, tmp_path: Path) -> None:
    homes = [make_home(tmp_path / name / "home", base) for name in "ab"]
    for home in homes:
        merge(home, base, 2, 3)
    assert card(homes[0], 2) == card(homes[1], 2)


def test_a_single_file_as_base_has_a_card_that_the_hub_reads(home: Home, base: Path) -> None:
    merge(home, base, 2)
    data = ModelCard(card(home, 1)).data.to_dict()
    assert data == {"tags": ["merge", "mainstem"]}  # a file has no name on the hub, no license and no library


def test_many_experts_are_read_and_listed_up_to_a_number(
    home: Home, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "MOST_EXPERTS", 2)
    merge(home, base, 2, 3, 4, 5)
    assert "And 2 earlier ones" in card(home, 4)
    assert "| 4 | 5.safetensors" in card(home, 4) and "| 3 | 4.safetensors" in card(home, 4)
    assert "3.safetensors" not in card(home, 4)
    taken_out(home, quick(), "5.safetensors")
    assert "| 3 | 4.safetensors" in card(home, 5) and "| 2 | 3.safetensors" in card(home, 5)
    with lineage(home) as reader:
        assert [one.name for one in origin(reader).newest] == ["4.safetensors", "3.safetensors"]


@pytest.mark.parametrize("method", ["mean", "opcm", "emr"])
def test_what_is_taken_out_leaves_the_card(rich: Path, tmp_path: Path, method: str) -> None:
    """Subtracted, or replayed and linked from the home inside: the card is this version's own, and so is its number."""
    home = make_home(tmp_path / "home", rich, [("main", method, {})])
    merge(home, rich, 2, 3, 4)
    gone = experts(home)[1]
    taken_out(home, quick(), "3.safetensors")
    text = card(home, 4)
    assert "# rich: main/4\n" in text and "merged out of 2 fine-tuned copies" in text
    listing, _, withdrawn = text.partition("## Taken out")
    assert str(gone.sha256) in withdrawn and str(gone.sha256) not in listing
    assert "| 2 | 4.safetensors" in listing and "| 1 | 2.safetensors" in listing
    taken_out(home, quick(), "2.safetensors", "4.safetensors")
    assert "This is the base itself" in card(home, 5)
    assert sound(home) == []


def test_a_rebuilt_home_and_a_new_head_have_cards_of_their_own(rich: Path, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", rich)
    merge(home, rich, 2, 3)
    add_head(home, quick(), "soup", make("mean", {}), Console())
    for number in (0, 2):
        assert f"# rich: soup/{number}\n" in card(home, number, "soup")
    assert "mean: `" in card(home, 2, "soup") and "| 2 | 3.safetensors" in card(home, 2, "soup")
    other = Home(tmp_path / "other")
    into(home, other, quick(), None, ["2.safetensors"], Console())
    assert "apache-2.0" in card(other, 1) and "| 1 | 3.safetensors" in card(other, 1)
    assert (other.version("main", 0) / "1_Pooling" / "config.json").exists()
    assert sound(home) == [] and sound(other) == []


def stamps(home: Home) -> dict[str, tuple[int | bytes, ...]]:
    """All that could change of each version's folder: its inode, times, mode and bytes, and those of all in it."""
    found: dict[str, tuple[int | bytes, ...]] = {}
    for head in home.published.iterdir():
        for version in head.glob("[0-9]*"):
            for path in [version, *version.rglob("*")]:
                at = path.lstat()
                content = path.read_bytes() if path.is_file() else b""
                key = str(path.relative_to(home.published))
                found[key] = (at.st_ino, at.st_mtime_ns, at.st_ctime_ns, at.st_mode, at.st_size, content)
    return found


def test_a_version_never_changes_after_its_rename(rich: Path, tmp_path: Path) -> None:
    """Through later merges, refusals, a withdrawal, retention, restarts, an unclean stop and repeated recovery."""
    home = make_home(tmp_path / "home", rich, [("main", "opcm", {}), ("soup", "mean", {})])
    history: dict[str, tuple[int | bytes, ...]] = {}

    def watched(step: Callable[[], object]) -> None:
        step()
        now = stamps(home)
        for name, stamp in now.items():
            assert history.setdefault(name, stamp) == stamp, f"{name} changed"

    def broken() -> None:
        (home.inbox / "bad.pt").write_bytes(b"\x80\x04 pickled")
        drain(home)

    def unclean() -> None:
        home.clean.unlink()
        (home.versions("main") / "LATEST").unlink()
        home.latest("main").unlink()
        with Store.open(home.registry) as store:
            recover(home, store, lambda *_, **__: None)
            recover(home, store, lambda *_, **__: None)

    watched(lambda: None)
    watched(lambda: merge(home, rich, 2, publish={"shard_bytes": 4000}))
    watched(lambda: merge(home, rich, 3))
    watched(broken)
    watched(unclean)
    watched(lambda: merge(home, rich, 4, publish={"dtype": "bfloat16"}))
    watched(lambda: taken_out(home, quick(), "2.safetensors"))
    before = len(stamps(home))
    watched(lambda: merge(home, rich, 5, retention={"versions": 2, "grace_seconds": 0}))
    assert len(stamps(home)) < before  # retention has removed some, whole
    watched(unclean)
    assert sound(home) == []
    assert {name.split("/")[1] for name in history} == {f"{n:06d}" for n in range(6)}


class PowerCut(BaseException):
    """Ends the work where it stands, whatever it would catch."""


def test_retention_removes_a_version_at_once(home: Home, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut short while it removes, it leaves no half of a version for anybody to load."""
    merge(home, base, 2, 3)
    settings = quick(retention={"versions": 1, "grace_seconds": 0}).retention

    def cut(path: Path) -> None:
        next(path.glob("*.safetensors")).unlink()
        raise PowerCut(path)

    with Store.open(home.registry) as store:
        with monkeypatch.context() as patched:
            patched.setattr(durable, "remove", cut)
            with pytest.raises(PowerCut):
                collect(home, store, settings)
        assert not home.version("main", 1).exists()
        recover(home, store, lambda *_, **__: None)
    assert not os.listdir(home.tmp) and not home.head_state("main", 1).exists()
    assert sound(home) == []


@pytest.mark.parametrize("versions", [1, 2])
def test_latest_and_its_plain_file_change_one_after_the_other(
    home: Home, base: Path, monkeypatch: pytest.MonkeyPatch, versions: int
) -> None:
    """Cut between the two, both still name whole versions, and recovery lets them agree."""
    merge(home, base, *range(2, 1 + versions))
    plain = home.versions("main") / "LATEST"

    def cut(path: Path, data: bytes) -> None:
        raise PowerCut(path)

    with monkeypatch.context() as patched:
        patched.setattr(durable, "replace_file", cut)
        put(home, write_expert(home.root.parent / "e.safetensors", base, 9))
        with pytest.raises(PowerCut):
            drain(home)
    assert home.latest("main").readlink() == Path(f"{versions:06d}")
    assert plain.read_text() == f"{versions - 1:06d}\n"
    assert (home.versions("main") / plain.read_text().strip() / "model.safetensors").exists()
    assert sound(home) == [], "no damage, as long as the expert waits for its place"
    drain(home)
    assert plain.read_text() == f"{versions:06d}\n" and sound(home) == []


@pytest.mark.parametrize("content", [b"", b"000001", b"1\n", b"\xff\xfe\n", b"000001\n000001\n", b"0" * 1000])
def test_a_damaged_latest_file_is_named_and_mended(home: Home, base: Path, content: bytes) -> None:
    merge(home, base, 2)
    (home.versions("main") / "LATEST").write_bytes(content)
    assert sound(home) == ["published/main/LATEST does not name main/1"]
    drain(home)
    assert (home.versions("main") / "LATEST").read_bytes() == b"000001\n"


@pytest.mark.parametrize("name", ["latest", "LATEST"])
def test_a_folder_in_its_way_is_left_alone_and_named(home: Home, name: str) -> None:
    """A copy of a home that followed links has a folder `latest`: it may be all that somebody has."""
    way = home.versions("main") / name
    way.unlink()
    shutil.copytree(home.version("main", 0), way)
    before = tree(way)
    with lineage(home) as reader, pytest.raises(BadHome, match=f"{name} is a folder") as refused:
        point_latest(home, reader.heads()[0])
    assert "move it away" in refused.value.hint
    assert tree(way) == before


def test_a_model_from_the_hubs_cache_has_its_name_there() -> None:
    assert name_of(Path("/x/hub/models--org--a-b_c/snapshots/0f1e2d")) == "org/a-b_c"
    assert name_of(Path("/x/hub/models--gpt2/snapshots/0f1e2d")) == "gpt2"
    assert name_of(Path("/x/snapshots/mine")) == "mine"
    assert name_of(Path("/x/base.safetensors")) == "base.safetensors"


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the library's own
@pytest.mark.parametrize("shard_bytes", [20_000, 5_000_000_000])
def test_transformers_loads_a_version_as_its_card_says(tmp_path: Path, shard_bytes: int) -> None:
    """A causal model with tied weights, in shards and in one file; the card's own lines are run."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    put(home, tmp_path / "tuned")
    drain(home, quick(publish={"shard_bytes": shard_bytes}))
    folder = home.latest("main").resolve()
    shards = sorted(folder.glob("model*.safetensors"))
    if shard_bytes < 1e6:
        index = json.loads((folder / "model.safetensors.index.json").read_bytes())
        assert len(shards) > 2 and max(path.stat().st_size for path in shards) < 2 * shard_bytes
        tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert {name: tensors[name].shape for name in index["weight_map"]} == {n: t.shape for n, t in tensors.items()}
    else:
        assert [path.name for path in shards] == ["model.safetensors"]
    assert ModelCard(card(home, 1)).data.to_dict()["library_name"] == "transformers"
    code = re.search(r"```python\n(.*?)```", card(home, 1), re.DOTALL)
    assert code and "import LlamaForCausalLM\n" in code[1]
    found: dict[str, LlamaForCausalLM] = {}
    exec(code[1].replace("path/to/this/folder", str(folder)), found)
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(found["model"].eval()(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    _, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.skipif(find_spec("sentence_transformers") is None, reason="sentence-transformers is not installed")
@pytest.mark.filterwarnings("ignore:::(sentence_)?transformers", "ignore:Importing from .sentence_transformers")
def test_sentence_transformers_loads_a_version_with_its_modules(tmp_path: Path) -> None:
    """Pooling, a dense layer with weights of its own, and normalizing: they are the base's, in folders of their own."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as modules
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "river", "rises", "bank"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    transformer = modules.Transformer(str(tmp_path / "bert"))
    pooling = modules.Pooling(16)
    model = SentenceTransformer(modules=[transformer, pooling, modules.Dense(16, 8), modules.Normalize()], device="cpu")
    model.save(str(tmp_path / "base"))
    home = make_home(tmp_path / "home", tmp_path / "base", [("main", "mean", {})])
    put(home, write_expert(tmp_path / "e.safetensors", tmp_path / "base", 2, scale=0.01))
    drain(home)
    folder = home.latest("main").resolve()
    assert {path.name for path in folder.iterdir() if path.is_dir()} >= {"1_Pooling", "2_Dense"}
    code = re.search(r"```python\n(.*?)```", card(home, 1), re.DOTALL)
    assert code and "SentenceTransformer(" in code[1]
    found: dict[str, SentenceTransformer] = {}
    exec(code[1].replace("path/to/this/folder", str(folder)), found)
    sentences = ["the river rises", "the bank"]
    merged, base = found["model"].encode(sentences), model.encode(sentences)
    assert merged.shape == (2, 8) and abs(merged - base).max() > 1e-3
    model[0].auto_model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert abs(found["model"].encode(sentences) - model.encode(sentences)).max() < 1e-6
