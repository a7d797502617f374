"""What docs/json.md says of each command's JSON, and what is really there."""

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs/json.md"
OPEN = {  # whose keys are a home's own words: heads, settings, tasks, tensors, figures; and manifests, which docs list
    *("figures", "params", "scores", "about", "totals", "verdict", "naming", "sidecars", "manifest", "experts"),
    *("renamed", "data", "evaluation", "dtypes", "parameters", "keeps", "verdicts", "depends", "layer_scales"),
}


def described(value: Any) -> str:
    """An object's keys, or those of a list's objects, as a row of the page has them, and of what lies in them."""
    if isinstance(value, list):
        return f"a list of: {_keys(value[0])}" if value else "a list"
    return _keys(value)


def documented() -> dict[str, str]:
    """What the page says, by command."""
    rows = re.findall(r"^\| `mainstem ([^`]+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == len(dict(rows)), "a command has two rows"
    return dict(rows)


def _keys(value: dict[str, Any]) -> str:
    return ", ".join(f"`{key}`{_below(key, one)}" for key, one in value.items())


def _below(key: str, value: Any) -> str:
    inner = value[0] if isinstance(value, list) and value else value
    if key in OPEN or not isinstance(inner, dict) or not inner:
        return ""
    return f" ({', '.join(f'`{one}`' for one in inner)})"
