"""`mainstem methods` and docs/methods.md are the code's, and `init` refuses each bad parameter of each method."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from daemon.home.presets import DEFAULT_METHOD
from projector.errors import BadParameter
from projector.laws.listing import lines, listing, markdown
from projector.method import Contribution, Method, State, Sums, Totals, method_params, param
from projector.methods import make, methods
from projector.spec import TensorSpec
from tests.daemon.homes import tree
from tests.daemon.processes import forked, forked_each


def asked(*words: str) -> str:
    done = forked("methods", *words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_method_is_listed_with_everything() -> None:
    found = json.loads(asked("--json"))
    assert [method["name"] for method in found] == list(methods())
    for method in found:
        assert method["summary"] and method["formula"] and method["paper"]
        kept = method["name"] != "zero_shot"
        assert (method["bytes_per_parameter"] > 0) == (method["vector_bytes_per_parameter"] > 0) == kept
        assert bool(method["keeps"]) == kept
        cls = methods()[method["name"]]
        assert method["parameters"].keys() == method_params(cls).keys()
        assert method["order_independent"] == cls().order_independent
        assert method["subtractable"] == cls().subtractable
        assert method["needs"] == list(cls().needs)
    words = asked()
    assert words.count(" (the default)\n") == 1 and f"{DEFAULT_METHOD} (the default)\n" in words
    for method in found:
        assert f"\n    {method['formula']}\n    {method['paper']}\n" in words
        for key, parameter in method["parameters"].items():
            assert parameter["help"] and f"    {key} = " in words


def test_one_method_is_listed_alone() -> None:
    assert asked("mean").startswith("mean\n") and "ema" not in asked("mean")
    assert json.loads(asked("mean", "--json"))["name"] == "mean"
    done = forked("methods", "magic")
    assert done.returncode == 1 and "opcm" in done.stderr


def test_the_letters_of_confluences_parameters_are_told() -> None:
    summary = json.loads(asked("confluence", "--json"))["summary"]
    assert all(sentence in summary for sentence in (" S is the sum", " R, with ", " s, is the", " G sums up", "L what"))


@pytest.mark.parametrize("name", methods())
def test_a_word_for_a_number_is_refused_with_what_is_allowed_and_an_example_that_works(name: str) -> None:
    for key, about in method_params(methods()[name]).items():
        if not isinstance(about["default"], bool | int | float):
            continue
        with pytest.raises(BadParameter, match=f"{name}.{key} cannot be 'abc'") as refused:
            make(name, {key: "abc"})
        allowed, _, example = refused.value.hint.partition("; for example ")
        assert allowed.removeprefix("allowed: ")
        given, _, value = example.partition("=")
        assert given == key and make(name, {key: value}) == make(name)
        if not isinstance(about["default"], bool):
            assert f"{about['low']:g} " in allowed
            with pytest.raises(BadParameter) as beyond:
                make(name, {key: about["low"] - 1})
            assert f"{about['low']:g} " in beyond.value.hint and beyond.value.hint.endswith(example)


@dataclass(frozen=True)
class Made(Method):
    """Keeps what `kind` says.

    More of it.
    """

    name = "made"
    formula = "base"
    paper = "none"
    kind: str = param("plain", "which accumulators", choices=("plain", "gram", "both"))
    twice: bool = param(False, "look at an expert twice")

    @property
    def needs(self) -> tuple[str, ...]:
        return () if self.kind == "plain" else ("gram",)

    @property
    def subtractable(self) -> bool:  # type: ignore[override]
        return self.kind == "both" and self.twice

    @property
    def rounds(self) -> int:  # type: ignore[override]
        return int(self.twice)

    def slots(self, spec: TensorSpec) -> dict[str, TensorSpec]:
        slots = {"S": TensorSpec(spec.name, spec.shape, torch.float32)}
        if len(spec.shape) == 2 and self.kind != "plain":
            side, small = spec.shape[1], min(spec.shape)
            slots["G"] = TensorSpec(spec.name, (side, side), torch.float64)
            if self.kind == "both":
                slots |= {
                    "s": TensorSpec(spec.name, (small,), torch.float32),
                    "n": TensorSpec(spec.name, (), torch.int64),
                }
        return slots

    def update(self, state: State, delta: torch.Tensor, spec: TensorSpec, expert: Contribution) -> tuple[State, Sums]:
        raise NotImplementedError

    def read(self, base: torch.Tensor, state: State, totals: Totals, spec: TensorSpec) -> torch.Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Both(Made):
    """Keeps everything."""

    name = "both"
    kind: str = param("both", "which accumulators", choices=("plain", "gram", "both"))


def test_what_depends_on_a_parameter_says_so() -> None:
    found = listing(Made)
    assert found.summary == "Keeps what `kind` says."
    assert (found.bytes_per_parameter, found.vector_bytes_per_parameter) == (4, 4)
    assert found.depends == {
        "keeps": ["kind"],
        "bytes_per_parameter": ["kind"],
        "needs": ["kind"],
        "reads": ["twice"],
        "subtractable": ["kind", "twice"],
    }
    facts = dict(lines(found))
    assert facts["keeps"] == "4 bytes per parameter: S m x n float32 (depends on kind)"
    assert facts["an expert must bring"] == "nothing but its weights (depends on kind)"
    assert facts["reads an expert"] == "once (depends on twice)"
    assert facts["taking an expert out"] == "replay (depends on kind, twice)"  # on both together


def test_matrices_beside_the_parameters_are_told_by_their_sides() -> None:
    found = listing(Both)
    assert found.keeps == {"S": "m x n float32", "G": "n x n float64", "s": "k float32", "n": "one int64"}
    assert found.bytes_per_parameter == pytest.approx(4 + 8 + 4 / 1024, rel=1e-4)
    assert found.vector_bytes_per_parameter == 4
    row = "| [`both`](#both) | 12 (kind) | matters | replay (kind, twice) | no | gram (kind) | 1 (twice) |"
    assert row in markdown([found])
    assert "- `twice=false` (true, false): look at an expert twice\n" in markdown([found])


def bad_settings(about: Mapping[str, Any]) -> list[str]:
    """Words of a command line that a parameter must refuse: beyond each end, idle, not a number, no such choice."""
    default, low, high, choices, idle = (about[key] for key in ("default", "low", "high", "choices", "idle"))
    found = [] if idle is None else [str(idle)]
    if isinstance(default, bool):
        return ["maybe", "2", ""]
    if isinstance(default, tuple):
        return []  # any words will do
    if low is not None:
        found.append(str(low - 1))
    if high is not None:
        found.append(str(high + 1))
    if choices or not isinstance(default, str):
        found += ["sideways", "", "nan", "inf"]
    if isinstance(default, int):
        found.append("1.5")
    return found


BAD = {
    name: [(key, value) for key, about in method_params(cls).items() for value in bad_settings(about)]
    for name, cls in methods().items()
}


def refused(base: Path, home: Path, method: str, settings: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Each setting of the method that `init` must refuse: (key, value, what it says)."""
    commands = [
        ("init", home, "--base", base, "--method", method, "--set", f"{key}={value}") for key, value in settings
    ]
    for (key, value), done in zip(settings, forked_each(commands), strict=True):
        assert done.returncode == 1, f"{key}={value}: {done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr and "hint" in done.stderr, f"{key}={value}: {done.stderr}"
        yield key, value, done.stderr
    assert not home.exists()


@pytest.mark.parametrize("name", [name for name, bad in BAD.items() if bad])
def test_init_refuses_each_bad_parameter_with_what_is_allowed(tmp_path: Path, base: Path, name: str) -> None:
    before = tree(base.parent)
    for key, value, told in refused(base, tmp_path / "home", name, BAD[name]):
        assert f"{name}.{key} cannot be" in told, f"{value}: {told}"
        allowed = listing(methods()[name]).parameters[key].range
        assert allowed in told or "it is a" in told, f"{value}: {told}"
    assert tree(base.parent) == before


@pytest.mark.parametrize("name", methods())
def test_init_refuses_an_unknown_parameter_and_names_the_known(tmp_path: Path, base: Path, name: str) -> None:
    ((_, _, told),) = refused(base, tmp_path / "home", name, [("nonsense", "1")])
    assert f"{name} has no parameter 'nonsense'" in told
    for key in method_params(methods()[name]):
        assert key in told


def test_every_parameter_has_a_range_or_choices() -> None:
    """A bound is what `init` can refuse by: only globs and truths need none."""
    for name, cls in methods().items():
        for key, about in method_params(cls).items():
            if not isinstance(about["default"], bool | tuple):
                assert about["choices"] or about["low"] is not None, f"{name}.{key}"


@pytest.mark.parametrize("name", methods())
@pytest.mark.parametrize("value", [{}, None, [1]], ids=repr)
def test_what_is_of_another_type_is_refused(name: str, value: object) -> None:
    """As it could stand in JSON; a command line only gives words."""
    for key in method_params(methods()[name]):
        with pytest.raises(BadParameter, match=rf"{name}\.{key} cannot be"):
            make(name, {key: value})
