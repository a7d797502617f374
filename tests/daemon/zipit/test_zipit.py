"""Whole models zipped: against the paper's rule written out, and permuted copies, which must come back as they were."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from daemon.errors import BadConfig, DaemonError, Reason, Refused
from daemon.zipit.zipping import How, graph_of, zipit
from projector.errors import BadParameter, BadSchema, BadValues
from projector.zipping.graph import Graph, parse_graph
from tests.daemon.processes import forked
from tests.jsons import described, documented
from tests.oracles.zipit import zipped_mlp, zipped_residual

MLP = """
import torch
from torch import nn
from safetensors.torch import load_file

def model(folder):
    weights = load_file(folder if folder.is_file() else folder / "model.safetensors")
    sizes = [weights[f"{n}.weight"].shape for n in (0, 2, 4)]
    return nn.Sequential(nn.Linear(*sizes[0][::-1]), nn.ReLU(), nn.Linear(*sizes[1][::-1]), nn.ReLU(),
                         nn.Linear(*sizes[2][::-1])).to(weights["0.weight"].dtype)

def batches():
    draw = torch.Generator().manual_seed(5)
    for _ in range(4):
        yield torch.randn(50, 6, generator=draw, dtype=torch.float64)
"""
RESIDUAL = """
import torch
from torch import nn

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.up = nn.Linear(5, 7, bias=False), nn.Linear(7, 9, bias=False)
        self.down, self.leave = nn.Linear(9, 7, bias=False), nn.Linear(7, 3, bias=False)

    def forward(self, x):
        stream = self.enter(x)
        return self.leave(stream + self.down(torch.relu(self.up(stream))))

def model(folder):
    return Residual().double()

def batches():
    draw = torch.Generator().manual_seed(5)
    for _ in range(4):
        yield torch.randn(50, 5, generator=draw, dtype=torch.float64)
"""
STREAM = {
    "nodes": [
        {
            "name": "stream",
            "features": {"input_of": "leave"},
            "made": {"enter.weight": 0, "down.weight": 0},
            "read": {"up.weight": 1, "leave.weight": 1},
        },
        {
            "name": "hidden",
            "features": {"input_of": "down"},
            "made": {"up.weight": 0},
            "read": {"down.weight": 1},
        },
    ]
}


def write_file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def write_model(path: Path, seed: int, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float64) -> Path:
    draw = torch.Generator().manual_seed(seed)
    save_file(
        {name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for name, shape in shapes.items()},
        path,
    )
    return path


def mlp(path: Path, seed: int, out: int = 4, wide: int = 8, dtype: torch.dtype = torch.float64) -> Path:
    sizes = {"0": (wide, 6), "2": (wide, wide), "4": (out, wide)}
    shapes = {f"{n}.weight": size for n, size in sizes.items()} | {f"{n}.bias": size[:1] for n, size in sizes.items()}
    return write_model(path, seed, shapes, dtype)


def residual(path: Path, seed: int) -> Path:
    shapes = {"enter": (7, 5), "up": (9, 7), "down": (7, 9), "leave": (3, 7)}
    return write_model(path, seed, {f"{name}.weight": shape for name, shape in shapes.items()})


def whole(out: Path) -> dict[str, Tensor]:
    return load_file(out / "model.safetensors")


def head(out: Path, name: str) -> dict[str, Tensor]:
    """As a plain loader of shards reads it."""
    index = json.loads((out / "heads" / name / "model.safetensors.index.json").read_text())
    shards = {file: load_file(out / "heads" / name / file) for file in {*index["weight_map"].values()}}
    return {tensor: shards[file][tensor] for tensor, file in index["weight_map"].items()}


def computed(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    for name in ("0", "2"):
        x = torch.relu(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])
    return x @ weights["4.weight"].T + weights["4.bias"]


def inputs(size: int = 6) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    return torch.cat([torch.randn(50, size, generator=draw, dtype=torch.float64) for _ in range(4)])


def same(found: dict[str, Tensor], right: dict[str, object]) -> float:
    """How far they are from each other, in units of the largest weight; the names are the same."""
    assert found.keys() == right.keys()
    return max(
        float((found[name] - torch.as_tensor(right[name])).abs().max() / found[name].abs().max()) for name in found
    )


@pytest.mark.parametrize(("alpha", "beta"), [(0, 1), (0, 0), (0.3, 0.5)])
def test_an_mlp_is_zipped_by_the_papers_rule(tmp_path: Path, alpha: float, beta: float) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    paths = [mlp(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    zipit(paths, data, tmp_path / "out", How(alpha, beta))
    models = [{name: one.numpy() for name, one in load_file(path).items()} for path in paths]
    right = zipped_mlp(models, inputs().numpy(), (0.5, 0.5), alpha, beta)
    assert same(whole(tmp_path / "out"), right) < 1e-12


def test_a_residual_stream_shares_one_zip(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", RESIDUAL)
    paths = [residual(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    zipit(paths, data, tmp_path / "out", How(), parse_graph(STREAM))
    models = [{name: one.numpy() for name, one in load_file(path).items()} for path in paths]
    assert same(whole(tmp_path / "out"), zipped_residual(models, inputs(5).numpy(), (0.5, 0.5))) < 1e-12


def test_three_models_are_zipped_one_after_the_other_and_count_alike(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    paths = [mlp(tmp_path / f"{n}.safetensors", n) for n in (1, 2, 3)]
    done = zipit(paths, data, tmp_path / "out", How())
    one, two, three = ({name: tensor.numpy() for name, tensor in load_file(path).items()} for path in paths)
    both = zipped_mlp([one, two], inputs().numpy(), (1 / 2, 1 / 2), 0, 1)
    right = zipped_mlp([both, three], inputs().numpy(), (2 / 3, 1 / 3), 0, 1)
    assert same(whole(tmp_path / "out"), right) < 1e-12
    assert [(met.step, met.node) for met in done.nodes] == [(2, "0"), (2, "2"), (3, "0"), (3, "2")]


def permuted(path: Path, out: Path, seed: int = 7) -> Path:
    """The MLP with its hidden features in another order."""
    weights, draw = load_file(path), torch.Generator().manual_seed(seed)
    for makes, reads in (("0", "2"), ("2", "4")):
        order = torch.randperm(len(weights[f"{makes}.bias"]), generator=draw)
        weights |= {f"{makes}.{kind}": weights[f"{makes}.{kind}"][order] for kind in ("weight", "bias")}
        weights[f"{reads}.weight"] = weights[f"{reads}.weight"][:, order].contiguous()
    save_file(weights, out)
    return out


def test_a_permuted_copy_gives_the_model_back_bit_for_bit(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    model = mlp(tmp_path / "one.safetensors", 1)
    copy = permuted(model, tmp_path / "copy.safetensors")
    done = zipit([model, copy], data, tmp_path / "out", How())
    before, after = load_file(model), whole(tmp_path / "out")
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(met.across == met.features and met.correlation > 1 - 1e-9 for met in done.nodes)
    assert (load_file(copy)["0.weight"] != before["0.weight"]).any(), "an average would have been another model"


def test_a_partial_zip_of_a_permuted_copy_has_heads_that_compute_the_same(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    model = mlp(tmp_path / "one.safetensors", 1)
    copy = permuted(model, tmp_path / "copy.safetensors")
    more = permuted(model, tmp_path / "more.safetensors", seed=8)
    done = zipit([model, copy, more], data, tmp_path / "out", How(to="0"))
    x, right = inputs(), computed(load_file(model), inputs())
    assert done.heads == ["heads/one", "heads/copy", "heads/more"]
    for name in ("one", "copy", "more"):
        torch.testing.assert_close(computed(head(tmp_path / "out", name), x), right, rtol=0, atol=1e-9)
    shared = [tmp_path / "out/heads" / name / "model-00001-of-00002.safetensors" for name in ("one", "copy", "more")]
    assert len({path.stat().st_ino for path in shared}) == 1, "stored once"
    assert set(load_file(shared[0])) == {"0.weight", "0.bias"}
    assert done.shared_bytes == 8 * (8 * 6 + 8) and done.own_bytes == 3 * 8 * (8 * 8 + 8 + 4 * 8 + 4)


def test_heads_of_models_that_are_called_alike_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    for place in ("x/m/below", "y/m", "m-1"):
        (tmp_path / place).mkdir(parents=True)
    paths = [mlp(tmp_path / n / "model.safetensors", 1).parent for n in ("x/m", "y/m", "m-1")]
    monkeypatch.chdir(tmp_path / "x/m/below")
    done = zipit([Path(".."), *paths[1:]], data, tmp_path / "out", How(to="0"))
    assert done.heads == ["heads/m-2", "heads/m-3", "heads/m-1"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"zipit.json", "heads"}


def test_what_was_zipped_is_zipped_again(tmp_path: Path) -> None:
    """Its record is not the new one's, and is left where it is."""
    data = write_file(tmp_path / "data.py", MLP)
    one, two, three = (mlp(tmp_path / f"{n}.safetensors", n) for n in range(3))
    zipit([one, two], data, tmp_path / "both", How())
    zipit([tmp_path / "both", three], data, tmp_path / "out", How())
    assert len(json.loads((tmp_path / "out/zipit.json").read_text())["models"]) == 2
    zipit([tmp_path / "both", three], data, tmp_path / "heads", How(to="0"))
    assert not (tmp_path / "heads/heads/both/zipit.json").exists()


def test_heads_of_different_tasks_are_zipped_up_to_a_node(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    paths = [mlp(tmp_path / "a.safetensors", 1, out=4), mlp(tmp_path / "b.safetensors", 2, out=3)]
    with pytest.raises(BadSchema, match=r"4\.bias is \[4\] in the first model and \[3\]") as caught:
        zipit(paths, data, tmp_path / "out", How())
    assert "--to" in caught.value.hint
    zipit(paths, data, tmp_path / "out", How(to="2"))
    one, two = (head(tmp_path / "out", name) for name in "ab")
    assert len(one["4.bias"]) == 4 and len(two["4.bias"]) == 3
    assert torch.equal(one["2.weight"], two["2.weight"])
    models = [{name: tensor.numpy() for name, tensor in load_file(path).items()} for path in paths]
    for model in models:
        model["4.weight"], model["4.bias"] = model["4.weight"][:3], model["4.bias"][:3]
    right = zipped_mlp(models, inputs().numpy(), (0.5, 0.5), 0, 1)
    torch.testing.assert_close(one["2.weight"], torch.as_tensor(right["2.weight"]), rtol=0, atol=1e-12)
    mixed = one["4.weight"][:3] / 2 + two["4.weight"] / 2
    torch.testing.assert_close(mixed, torch.as_tensor(right["4.weight"]), rtol=0, atol=1e-12)


CONVOLUTIONS = """
import torch
from torch import nn

def model(folder):
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(20, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, 3))

def batches():
    draw = torch.Generator().manual_seed(5)
    for _ in range(3):
        yield torch.randn(20, 1, 8, 8, generator=draw)
"""


def test_convolutions_and_norms_are_zipped_and_their_statistics_are_of_the_data(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", CONVOLUTIONS)
    space: dict[str, Callable[..., object]] = {}
    exec(CONVOLUTIONS, space)
    torch.manual_seed(1)
    module = space["model"](None)
    assert isinstance(module, nn.Module)
    batch = torch.cat(list(space["batches"]()))  # type: ignore[call-overload]
    module.train()(batch)
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    save_file(weights, tmp_path / "a.safetensors")
    order, channels = torch.randperm(6), torch.randperm(5)
    other = dict(weights)
    for name in ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
        other[name] = weights[name][order]
    other["3.weight"] = weights["3.weight"][channels][:, order]
    for name in ("3.bias", "4.weight", "4.bias", "4.running_mean", "4.running_var"):
        other[name] = weights[name][channels]
    other["8.weight"] = weights["8.weight"].reshape(7, 5, 4)[:, channels].reshape(7, 20)
    save_file({name: tensor.contiguous() for name, tensor in other.items()}, tmp_path / "b.safetensors")
    done = zipit([tmp_path / "a.safetensors", tmp_path / "b.safetensors"], data, tmp_path / "out", How())
    assert [(met.node, met.features) for met in done.nodes] == [("0", 6), ("3", 5), ("8", 7)]
    found = whole(tmp_path / "out")
    learnt = [name for name in weights if "running" not in name and "tracked" not in name]
    assert all(torch.equal(found[name], weights[name]) for name in learnt)
    first = nn.functional.conv2d(batch, weights["0.weight"], weights["0.bias"])
    mean = torch.stack([part.mean((0, 2, 3)) for part in first.split(20)]).mean(0)
    torch.testing.assert_close(found["1.running_mean"], mean)
    assert int(found["1.num_batches_tracked"]) == 3


def test_a_graph_that_misses_a_tensor_is_found_out(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", RESIDUAL)
    paths = [residual(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    short = json.loads(json.dumps(STREAM))
    del short["nodes"][0]["read"]["up.weight"]
    with pytest.raises(Refused, match="with the features of stream shuffled the model computes something else"):
        zipit(paths, data, tmp_path / "out", How(), parse_graph(short))
    with pytest.raises(Refused, match="nor of a family whose graph is known") as caught:
        zipit(paths, data, tmp_path / "out", How())
    assert "--graph" in caught.value.hint
    with pytest.raises(BadParameter, match="no model can be cut behind stream"):
        zipit(paths, data, tmp_path / "out", How(to="stream"), parse_graph(STREAM))
    zipit(paths, data, tmp_path / "out", How(to="hidden"), parse_graph(STREAM))
    assert not any(tmp_path.glob(".out*"))


def test_features_that_are_taken_elsewhere_are_found_out(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    paths = [mlp(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    graph = graph_of(paths[0], data).described()
    first, second = graph["nodes"]
    first["features"], second["features"] = second["features"], first["features"]
    with pytest.raises(Refused, match="the features of 0 are not where the graph takes them"):
        zipit(paths, data, tmp_path / "out", How(), parse_graph(graph))
    first["features"] = [{"input_of": "4"}, {"output_of": "4"}]
    with pytest.raises(Refused, match="0 has 8 features by its tensors, and 4 where they are taken"):
        zipit(paths, data, tmp_path / "out", How(), parse_graph(graph))
    first["features"] = {"input_of": "5"}
    with pytest.raises(Refused, match="the model has no module 5"):
        zipit(paths, data, tmp_path / "out", How(), parse_graph(graph))
    first["features"] = {"input_of": "4", "axis": 2}
    with pytest.raises(Refused, match="have no axis 2"):
        zipit(paths, data, tmp_path / "out", How(), parse_graph(graph))


def altered(path: Path, **changes: Tensor) -> Path:
    save_file({**load_file(path), **changes}, path)
    return path


BAD: list[tuple[str, str, type[Exception], str]] = [
    ("wide", MLP, BadSchema, r"0\.bias is \[8\] in the first model and \[9\]"),
    ("more", MLP, BadSchema, "the second model has also 6.weight"),
    ("nan", MLP, Refused, "0.bias has NaN or infinity"),
    ("", MLP.replace("range(4)", "range(0)"), Refused, "the calibration data has no batch"),
    (
        "",
        MLP.replace("range(4)", "range(1)").replace("50, 6", "20, 6"),
        BadValues,
        "0: the calibration data gave 20",
    ),
    ("", MLP.replace("50, 6", "50, 5"), Refused, "cannot be run on the calibration data: RuntimeError"),
    ("", MLP.replace("yield torch", "yield torch.nan * torch"), Refused, "gives NaN or infinity"),
    ("", MLP.replace("nn.ReLU()", "nn.Softmax(1)"), Refused, "1: Softmax is no layer whose graph is known"),
    ("", MLP.replace("def batches", "def data"), Refused, "has no function batches"),
    ("", MLP.replace("nn.Linear(*sizes[2]", "nn.Linear(*sizes[1]"), Refused, "do not fit what model"),
    ("", MLP.replace("import torch\n", "import torches\n", 1), Refused, "data.py failed: ModuleNotFoundError"),
    ("", MLP.replace("draw = ", "draw = folder "), Refused, r"data\.py failed: SyntaxError"),
    (
        "",
        MLP.replace("        yield", "        raise KeyError('x')\n        yield"),
        Refused,
        r"batches\(\) of data.py failed",
    ),
]


@pytest.mark.parametrize(("second", "text", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_what_cannot_be_zipped_is_refused(
    tmp_path: Path, second: str, text: str, error: type[Exception], message: str
) -> None:
    data = write_file(tmp_path / "data.py", text)
    one = mlp(tmp_path / "one.safetensors", 1)
    two = mlp(tmp_path / "two.safetensors", 2, wide=9 if second == "wide" else 8)
    if second == "more":
        altered(two, **{"6.weight": torch.zeros(2, 2)})
    if second == "nan":
        altered(two, **{"0.bias": torch.full((8,), torch.nan)})
    with pytest.raises(error, match=message) as caught:
        zipit([one, two], data, tmp_path / "out", How())
    assert caught.value.hint  # type: ignore[attr-defined]
    assert not (tmp_path / "out").exists() and not any(tmp_path.glob(".*"))


def test_constant_features_are_zipped_last_and_told_of(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    paths = [mlp(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    for path in paths:
        bias = load_file(path)["0.bias"]
        bias[:5] = -100  # ReLU lets nothing through
        altered(path, **{"0.bias": bias})
    done = zipit(paths, data, tmp_path / "out", How())
    assert done.nodes[0].dead == 10
    assert done.warnings == ["0: 10 of 16 features were constant, and zipped as they came"]


def test_few_rows_are_told_of(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", MLP.replace("range(4)", "range(1)"))
    paths = [mlp(tmp_path / f"{n}.safetensors", n, wide=30) for n in (1, 2)]
    done = zipit(paths, data, tmp_path / "out", How())
    assert done.warnings[0].startswith("0: 50 rows for 60 features: more data")


def test_half_precision_stays_and_is_computed_in_more(tmp_path: Path) -> None:
    text = MLP.replace('.to(weights["0.weight"].dtype)', "").replace(", dtype=torch.float64", "")
    data = write_file(tmp_path / "data.py", text)
    paths = [mlp(tmp_path / f"{n}.safetensors", n, dtype=torch.bfloat16) for n in (1, 2)]
    zipit(paths, data, tmp_path / "out", How())
    assert {tensor.dtype for tensor in whole(tmp_path / "out").values()} == {torch.bfloat16}


def test_the_command_line(tmp_path: Path) -> None:
    data = write_file(tmp_path / "data.py", MLP)
    paths = [mlp(tmp_path / f"{n}.safetensors", n) for n in (1, 2)]
    done = forked("zipit", *paths, "--calibration", data, "--out", tmp_path / "out", "--to", "2", "--json")
    report = json.loads(done.stdout)
    assert described(report) == documented()["zipit"]
    record = json.loads((tmp_path / "out/zipit.json").read_text())
    assert record.items() >= report.items() and len(record["sha256"]) == 2
    shown = forked("zipit", paths[0], "--calibration", data, "--show-graph")
    assert parse_graph(json.loads(shown.stdout)) == graph_of(paths[0], data)
    own = write_file(tmp_path / "graph.json", shown.stdout)
    again = forked("zipit", *paths, "--calibration", data, "--out", tmp_path / "again", "--graph", own)
    assert again.returncode == 0 and f"wrote {tmp_path / 'again'}" in again.stdout, again.stderr
    same = forked("zipit", *paths, "--calibration", data, "--out", tmp_path / "again")
    assert same.returncode == 1 and "is there already" in same.stderr and "hint:" in same.stderr
    wrong = write_file(tmp_path / "wrong.json", "{")
    bad = forked("zipit", *paths, "--calibration", data, "--out", tmp_path / "new", "--graph", wrong)
    assert bad.returncode == 1 and "is no JSON" in bad.stderr
    assert forked("zipit", *paths, "--calibration", data).returncode == 2


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["0"]})
    )
    down, up = torch.zeros(2, 6), torch.zeros(8, 2)
    names = {"base_model.model.0.lora_A.weight": down, "base_model.model.0.lora_B.weight": up}
    save_file(names, folder / "adapter_model.safetensors")
    with pytest.raises(Refused, match="adapter: it is an adapter") as caught:
        graph_of(folder, write_file(tmp_path / "data.py", MLP))
    assert caught.value.reason is Reason.ZIPIT and "merge_and_unload" in caught.value.hint


def test_nothing_is_zipped_alone_or_onto_something(tmp_path: Path) -> None:
    data, one = write_file(tmp_path / "data.py", MLP), mlp(tmp_path / "one.safetensors", 1)
    cases: tuple[tuple[list[Path], str, type[DaemonError], str], ...] = (
        ([one], "out", Refused, "one model has nothing"),
        ([one, one], "one.safetensors", BadConfig, "is there already"),
        ([one, one], "new.safetensors", BadConfig, "would be a folder"),
        ([one, one], "no/out", BadConfig, "does not exist"),
    )
    for paths, out, error, message in cases:
        with pytest.raises(error, match=message):
            zipit(paths, data, tmp_path / out, How())
    with pytest.raises(Refused, match="there is nothing"):
        graph_of(tmp_path / "nothing", data)
    (tmp_path / "empty/inner").mkdir(parents=True)
    shutil.copy(one, tmp_path / "empty/inner/model.safetensors")
    with pytest.raises(Refused, match="empty: its weights are in inner") as caught:
        graph_of(tmp_path / "empty", data)
    assert f"give the folder itself, {tmp_path}/empty/inner" in caught.value.hint
    with pytest.raises(BadParameter, match="alpha = 2"):
        zipit([one, one], data, tmp_path / "out", How(alpha=2))
    assert isinstance(graph_of(one, data), Graph)
