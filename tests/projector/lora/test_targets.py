"""Which modules an adapter is for: peft's own rule decides, wherever a config is understood."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from daemon.checkpoints.adapter_config import ADAPTER, read_config
from projector.errors import BadSchema
from tests.adapters import configure, deltas, llama, merged, train, write
from tests.projector.lora.test_lora import assert_same

pytestmark = pytest.mark.filterwarnings("ignore:::(transformers|peft)")  # the libraries' own

MODULES = [f"model.layers.{n}.{m}" for n in (0, 1, 11) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]
MODULES += ["q_proj", "lm_head", "layers.1.q_proj", "h.1.q_proj", "xq_proj", "model.q_proj"]
CONFIGS: dict[str, dict[str, Any]] = {
    "a list": {"target_modules": ["q_proj", "mlp.up_proj"]},
    "a caret in a list is a letter": {"target_modules": ["^q_proj", "v_proj"]},
    "an expression": {"target_modules": r"model\.layers\.[01]\.self_attn\.(q|v)_proj"},
    "an expression with a caret": {"target_modules": r"^model.layers.0.*_proj$"},
    "an expression is for the whole name": {"target_modules": "q_proj"},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.q_proj", "v_proj"]},
    "excluded by an expression": {"target_modules": ["q_proj"], "exclude_modules": ".*layers.11.*"},
    "layers": {"target_modules": ["q_proj", "up_proj", "model.layers.11.self_attn.v_proj"], "layers_to_transform": [0]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_left_out_is_what_peft_leaves_out(case: str) -> None:
    settings = CONFIGS[case]
    theirs = LoraConfig(**settings)
    ours = read_config({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **settings}).targets
    found = {module: not ours.leaves_out(module) for module in MODULES}
    wanted = {module: check_target_module_exists(theirs, module) for module in MODULES}
    assert found == {module: bool(one) and "Excluded" not in type(one).__name__ for module, one in wanted.items()}
    assert any(found.values()) and not all(found.values())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": r"(?!.*vision).*"},
        {"target_modules": "(q|"},
        {"target_modules": 3},
        {"target_modules": ["k_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "layers_to_transform": [5], "layers_pattern": "layers"},
    ],
)
def test_what_is_not_understood_says_nothing(settings: dict[str, Any]) -> None:
    ours = read_config({"peft_type": "LORA", "r": 1, "lora_alpha": 1, **settings}).targets
    assert not ours.leaves_out("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize(
    "fields",
    [{"target_modules": ["q_proj"]}, {"exclude_modules": ["v_proj"]}, {"layers_to_transform": [1]}],
)
def test_what_peft_would_leave_out_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    base = write(llama, tmp_path)
    folder = train(llama, tmp_path / "adapter", r=2, target_modules=["q_proj", "v_proj"])
    wanted = merged(llama, folder)
    configure(folder, **fields)
    with pytest.raises(BadSchema, match="peft leaves it out") as caught:
        deltas(base, folder)
    assert "take target_modules, exclude_modules and layers_to_transform out" in caught.value.hint
    content = json.loads((folder / ADAPTER).read_text())
    for key in ("target_modules", "exclude_modules", "layers_to_transform"):
        content.pop(key, None)
    (folder / ADAPTER).write_text(json.dumps(content))
    assert_same(deltas(base, folder), wanted)
