"""Experts of another architecture, or of another size: it is said, and nothing is advised that cannot help."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from daemon.home import Home
from tests.adapters import bert, gpt2, llama, train, transformers, write
from tests.daemon.homes import drain, experts, make_home

pytestmark = pytest.mark.filterwarnings("default")  # the library's own


def of_size(hidden: int, layers: int) -> Callable[[], nn.Module]:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
    )
    return lambda: transformers.LlamaForCausalLM(config)


SIZED = of_size(32, 2)
OTHERS = {
    "another architecture": (gpt2, SIZED),
    "and some names alike": (bert, of_size(20, 2)),
    "deeper and wider": (SIZED, of_size(48, 4)),
    "shallower and smaller": (SIZED, of_size(24, 1)),
    "under a prefix": (lambda: nn.ModuleDict({"wrapped": nn.ModuleDict({"model": of_size(48, 2)()})}), SIZED),
}
OF_THIS = {
    "a prefix that counts": (lambda: nn.ModuleList([nn.ModuleDict({"x": SIZED()}) for _ in range(2)]), SIZED),
    "less layers": (of_size(32, 1), SIZED),
}


def refused(tmp_path: Path, base: Path, expert: Callable[[], nn.Module]) -> str:
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    write(expert, tmp_path).rename(home.inbox / "one.safetensors")
    drain(home)
    assert experts(home)[0].status == "quarantined"
    return experts(home)[0].hint or ""


@pytest.mark.parametrize("case", OTHERS)
def test_another_model_is_called_so(tmp_path: Path, case: str) -> None:
    expert, base = OTHERS[case]
    (tmp_path / "base").mkdir()
    hint = refused(tmp_path, write(base, tmp_path / "base"), expert)
    assert hint.startswith("it is of another architecture or size") and "`mainstem init`" in hint
    assert not any(word in hint for word in ("admission", "prefixes", "ignore", "unchanged", "leave out"))


@pytest.mark.parametrize("case", OF_THIS)
def test_what_may_be_the_same_model_is_not(tmp_path: Path, case: str) -> None:
    expert, base = OF_THIS[case]
    (tmp_path / "base").mkdir()
    assert "another architecture" not in refused(tmp_path, write(base, tmp_path / "base"), expert)


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    home: Home = make_home(tmp_path / "home", write(SIZED, tmp_path), [("main", "mean", {})])
    other = train(gpt2, tmp_path / "gpt2", r=2, target_modules=["c_attn"])
    same = train(llama, tmp_path / "llama", r=2, target_modules=["gate_proj"])
    for path in (other, same):
        path.rename(home.inbox / path.name)
    drain(home)
    hints = {expert.name: expert.hint or "" for expert in experts(home)}
    assert hints["gpt2"].startswith("it is of another architecture") and "prefixes" not in hints["gpt2"]
    assert "this home's base" in hints["llama"]
