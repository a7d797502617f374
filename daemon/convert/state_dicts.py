"""Finds the weights in what a trainer pickled, once it is loaded, and names what cannot be written or is left out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from daemon.errors import Reason, Refused
from projector.errors import Reason as ProjectorReason
from projector.files.header import NAMES
from projector.text import listed, shown

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")  # under which trainers keep the weights
MOST_WRAPPERS = 8
ONLY_WEIGHTS = "where it was trained, save the weights alone: torch.save(model.state_dict(), path)"


def find_weights(loaded: Any, key: str | None) -> tuple[Mapping[Any, Any], list[str], list[dict[str, str]]]:
    """(the state dict, under which keys it lies, what else there was on the way). Raises Refused."""
    here: Any = loaded
    inside: list[str] = []
    left_out: list[dict[str, str]] = []

    def enter(name: str) -> None:
        nonlocal here
        left_out.extend(left_out_of(inside, other, value) for other, value in here.items() if other != name)
        inside.append(name)
        here = here[name]

    for name in key.split("/") if key else ():
        if not isinstance(here, dict) or name not in here:
            raise Refused(Reason.CONVERT, f"it has no {shown(name)}", f"{_contents(here)}; mend --key")
        enter(name)
    for _ in range(MOST_WRAPPERS):
        if not isinstance(here, dict):
            raise Refused(Reason.NO_WEIGHTS, f"it holds {_described(here)}, no state dict", ONLY_WEIGHTS)
        inner = [name for name in WRAPPERS if isinstance(here.get(name), dict) and _weigh(here[name])[0]]
        if len(inner) > 1:
            raise Refused(Reason.CONVERT, f"its weights are in {listed(inner)}", "choose one with --key")
        if not inner:
            break
        enter(inner[0])
    else:
        raise Refused(Reason.CONVERT, f"its weights lie more than {MOST_WRAPPERS} levels deep", ONLY_WEIGHTS)
    if not any(isinstance(value, Tensor) for value in here.values()):
        raise Refused(
            Reason.NO_WEIGHTS,
            "it has no tensor where a state dict has them",
            f"{_contents(here)}; name the one that holds the weights with --key, or save a state dict",
        )
    return here, inside, left_out


def named_tensors(weights: Mapping[Any, Any], prefix: str) -> tuple[dict[str, Tensor], int]:
    """(the tensors by their names less the prefix, how many had it). Raises Refused for what cannot be written."""
    tensors: dict[str, Tensor] = {}
    flaws: dict[str, str] = {}
    stripped = 0
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            continue
        if not isinstance(name, str) or not name or not name.isprintable() or name == "__metadata__":
            raise Refused(Reason.CONVERT, f"{shown(repr(name))} cannot be the name of a tensor", ONLY_WEIGHTS)
        if flaw := _flaw(tensor):
            flaws[name] = flaw
        short = name.removeprefix(prefix)
        stripped += short != name
        if short in tensors or not short:
            raise Refused(
                Reason.CONVERT,
                f"without {shown(prefix)}, {shown(name)} would bear another's name",
                "mend --strip-prefix",
            )
        tensors[short] = tensor
    if flaws:
        raise Refused(
            ProjectorReason.UNSUPPORTED_DTYPE,
            f"{len(flaws)} tensors cannot be converted: {listed(f'{n} ({flaw})' for n, flaw in flaws.items())}",
            "save dense tensors as float32, float16, bfloat16 or float64; whole numbers and bool are kept too",
        )
    return tensors, stripped


def _flaw(tensor: Tensor) -> str | None:
    """Why a tensor cannot be written, in words; None where it can."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.is_quantized:
        return f"quantised, {_dtype(tensor)}"
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "nested" if tensor.is_nested else f"sparse, {str(tensor.layout).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return f"without values, on the device {tensor.device.type}"
    return None if tensor.dtype in NAMES else _dtype(tensor)


def shared_storages(tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """The tensors that share memory, in groups: `identical` ones, such as tied weights, and views of one storage, of
    which each is named once.
    """
    storages: dict[int, dict[tuple[Any, ...], list[str]]] = {}
    for name, tensor in tensors.items():
        if tensor.untyped_storage().nbytes():
            place = tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
            storages.setdefault(tensor.untyped_storage().data_ptr(), {}).setdefault(place, []).append(name)
    groups = []
    for places in storages.values():
        groups += [{"names": names, "identical": True} for names in places.values() if len(names) > 1]
        if len(places) > 1:
            groups.append({"names": [names[0] for names in places.values()], "identical": False})
    return groups


def left_out_of(inside: list[str], name: Any, value: Any) -> dict[str, str]:
    """What is left out, by its name and in a few words, for the report."""
    return {"name": shown("/".join([*inside, str(name)])), "what": _described(value)}


def _described(value: Any) -> str:
    """A value in a few words."""
    if isinstance(value, Tensor):
        return f"a tensor, {_dtype(value)} {list(value.shape)}"
    if isinstance(value, dict | list | tuple | set):
        tensors, nbytes = _weigh(value)
        entries = f"a {type(value).__name__} of {len(value)}"
        return f"{entries}, in which {tensors} tensors of {nbytes} bytes" if tensors else entries
    return shown(repr(value)[:200]) if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


def _contents(value: Any) -> str:
    return f"it holds {listed(map(str, value))}" if isinstance(value, dict) and value else f"it is {_described(value)}"


def _weigh(value: Any) -> tuple[int, int]:
    """(tensors, their bytes) anywhere in nested containers, which may hold themselves."""
    tensors, nbytes, seen, waiting = 0, 0, set(), [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor):
            tensors, nbytes = tensors + 1, nbytes + one.numel() * one.itemsize
        elif isinstance(one, dict | list | tuple | set) and id(one) not in seen:
            seen.add(id(one))
            waiting.extend(one.values() if isinstance(one, dict) else one)
    return tensors, nbytes


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
