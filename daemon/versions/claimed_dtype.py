"""The dtype that a model's config.json claims: loaders convert to it whatever the weights are in."""

import json
from typing import Any

KEYS = ("dtype", "torch_dtype")  # as transformers has it from version 5 on, and before


def config_in(text: bytes, dtype: str) -> bytes:
    """The config.json with `dtype` ("float32") wherever it names one, also for a part of the model.

    One that is no JSON object, or names none, comes back as it is.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        return text
    stated = _stated(config, dtype)
    return text if stated == config else json.dumps(stated, indent=2).encode() + b"\n"


def _stated(config: Any, dtype: str) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        key: dtype if key in KEYS and isinstance(value, str) else _stated(value, dtype) for key, value in config.items()
    }
