"""`mainstem compare`: the figures are those of the weights, and every way to name a version works."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from daemon.layout import Home
from daemon.reports.compare import layer_group
from tests.daemon.homes import drain, make_home, put, quick
from tests.daemon.processes import forked
from tests.models import read_weights, write_base, write_expert

Vector = dict[str, Tensor]


def compared(home: Home, *words: str) -> Any:
    done = forked("compare", *words, "--json", "--home", home.root)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def difference(model: Path, base: Path) -> Vector:
    start = read_weights(base)
    return {
        name: weight.double() - start[name].double()
        for name, weight in read_weights(model).items()
        if weight.is_floating_point()
    }


def dot(x: Vector, y: Vector, prefix: str = "") -> float:
    return sum(float((x[name] * y[name]).sum()) for name in x if name.startswith(prefix))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Path]:
    """A home with two heads and three experts of which the first is no longer in the archive, and its base."""
    root = tmp_path_factory.mktemp("compare")
    base = write_base(root / "base.safetensors", seed=1)
    home = make_home(root / "home", base, [("main", "opcm", {}), ("soup", "mean", {})])
    for seed in (2, 3, 4):
        put(home, write_expert(root / f"e{seed}.safetensors", base, seed, scale=0.01 * seed))
        drain(home, quick(retention={"versions": 2, "grace_seconds": 0}))
    shutil.rmtree(home.archive(1))
    return home, base


def test_norms_and_cosines_are_those_of_the_weights(made: tuple[Home, Path]) -> None:
    home, base = made
    found = compared(home, "main", "soup")
    assert (found["a"], found["b"]) == ("main/3", "soup/3") and "experts" not in found
    a, b = (difference(home.version(head, 3), base) for head in ("main", "soup"))
    total = found["total"]
    assert total["tensors"] == len(a) and total["parameters"] == sum(tensor.numel() for tensor in a.values())
    assert total["a_norm"] == pytest.approx(dot(a, a) ** 0.5, rel=1e-6)
    assert total["b_norm"] == pytest.approx(dot(b, b) ** 0.5, rel=1e-6)
    assert total["cosine"] == pytest.approx(dot(a, b) / (dot(a, a) * dot(b, b)) ** 0.5, rel=1e-6)
    assert 0.1 < total["cosine"] < 0.999  # else equal figures would prove nothing
    assert sum(group["a_norm"] ** 2 for group in found["groups"]) == pytest.approx(total["a_norm"] ** 2)
    names = [group["group"] for group in found["groups"]]
    assert sorted(names) == sorted({layer_group(name) for name in a})
    assert "layers.*.attention" in names
    embedding = next(group for group in found["groups"] if group["group"] == "embed_tokens")
    of_a, of_b = dot(a, a, "embed"), dot(b, b, "embed")
    assert embedding["cosine"] == pytest.approx(dot(a, b, "embed") / (of_a * of_b) ** 0.5, rel=1e-6)


def test_what_is_kept_of_each_expert(made: tuple[Home, Path]) -> None:
    home, base = made
    gone, second, third = compared(home, "main", "soup/2", "--experts")["experts"]
    assert (gone["id"], gone["a_kept"], gone["b_cosine"]) == (1, None, None) and gone["norm"] > 0
    a, b = difference(home.version("main", 3), base), difference(home.version("soup", 2), base)
    for expert in (second, third):
        tau = difference(home.archive(expert["id"]) / expert["name"], base)
        assert expert["norm"] == pytest.approx(dot(tau, tau) ** 0.5, rel=1e-5)
        for merged, side in ((a, "a"), (b, "b")):
            assert expert[f"{side}_kept"] == pytest.approx(dot(tau, merged) / dot(tau, tau), rel=1e-5)
            cosine = dot(tau, merged) / (dot(tau, tau) * dot(merged, merged)) ** 0.5
            assert expert[f"{side}_cosine"] == pytest.approx(cosine, rel=1e-5)
    assert second["b_kept"] > 0.4  # half of it, in an average of two
    assert abs(third["b_kept"]) < 0.2  # soup/2 has not seen it
    alone = compared(home, "soup/2", "2", "--experts")["experts"]
    assert [expert["version"] for expert in alone] == [1, 2]


def test_a_version_is_one_with_itself_and_has_no_angle_with_the_base(made: tuple[Home, Path]) -> None:
    home, _ = made
    same = compared(home, "v3", "main@3")
    assert same["total"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert same["total"]["a_norm"] == same["total"]["b_norm"]


def test_the_base_has_no_direction(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=1)
    home = make_home(tmp_path / "home", base)
    put(home, write_expert(tmp_path / "e.safetensors", base, 2))
    drain(home)
    found = compared(home, "0", "main", "--experts")
    assert found["a"] == "main/0" and found["total"]["a_norm"] == 0 and found["total"]["b_norm"] > 0
    assert found["total"]["cosine"] is None
    (expert,) = found["experts"]
    assert expert["a_kept"] == 0 and expert["a_cosine"] is None
    assert expert["b_kept"] == pytest.approx(1, rel=1e-5) and expert["b_cosine"] == pytest.approx(1, rel=1e-5)


def test_blocks_give_the_sums_of_the_whole(made: tuple[Home, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    home, _ = made
    whole = compared(home, "main", "soup", "--experts")
    monkeypatch.setattr("projector.driver.measure.BLOCK_BYTES", 256)
    split = compared(home, "main", "soup", "--experts")
    assert split["total"].pop("cosine") == pytest.approx(whole["total"].pop("cosine"), rel=1e-9)
    assert split["total"] == pytest.approx(whole["total"], rel=1e-9)
    assert split["experts"][1]["a_kept"] == pytest.approx(whole["experts"][1]["a_kept"], rel=1e-9)


def test_people_get_tables(made: tuple[Home, Path]) -> None:
    home, _ = made
    done = forked("compare", "main", "soup", "--experts", "--home", home.root)
    assert done.returncode == 0, done.stderr
    for word in ("norm main/3", "norm soup/3", "kept soup/3", "layers.*.up", "total", "e3.safetensors"):
        assert word in done.stdout
    short = forked("compare", "main", "soup", "--home", home.root)
    assert "kept" not in short.stdout and "e3" not in short.stdout


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("nobody", "names no version"),
        ("nobody/3", "names no version"),
        ("main/x", "names no version"),
        ("main/", "names no version"),
        ("²", "names no version"),
        ("9" * 30, "names no version"),
        ("soup/9", "no version soup/9"),
        ("soup/1", "removed by retention"),
    ],
)
def test_what_cannot_be_compared_is_told(made: tuple[Home, Path], words: str, wanted: str) -> None:
    home, _ = made
    done = forked("compare", "main", words, "--home", home.root)
    assert done.returncode == 1 and wanted in done.stderr and "hint" in done.stderr


def test_layers_are_grouped_by_their_names_without_numbers() -> None:
    assert layer_group("h.3.attn.c_attn.bias") == "h.*.attn.c_attn"
    assert layer_group("model.layers.0.mlp.experts.7.w1.weight") == "model.layers.*.mlp.experts.*.w1"
    assert layer_group("layer1.0.conv2.weight") == "layer1.*.conv2"
    assert layer_group("logit_scale") == "logit_scale"
    assert layer_group("weight") == "weight"
