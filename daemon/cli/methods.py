"""`mainstem methods`: what can be chosen."""

import inspect
from typing import TYPE_CHECKING, Any

import typer

from daemon.cli.common import JsonOption, print_json

if TYPE_CHECKING:
    from projector.method import Method


def command(as_json: JsonOption = False) -> None:
    """List the merging methods: formula, paper, parameters, what they keep."""
    # imported here: it brings torch
    from projector.methods import methods

    described = [_described(cls) for cls in methods().values()]
    if as_json:
        print_json(described)
        return
    for method in described:
        typer.echo(f"{method['name']}\n    {method['summary']}\n    {method['formula']}\n    {method['paper']}")
        order = "does not matter" if method["order_independent"] else "matters"
        typer.echo(f"    keeps {method['bytes_per_parameter']:g} bytes per parameter; the order of experts {order}")
        for name, parameter in method["parameters"].items():
            allowed = f" ({parameter['range']})" if parameter["range"] else ""
            typer.echo(f"    {name} = {_value(parameter['default'])}: {parameter['help']}{allowed}")
        typer.echo()


def _described(cls: "type[Method]") -> dict[str, Any]:
    import torch

    from projector.method import method_params, param_range
    from projector.spec import TensorSpec

    spec = TensorSpec("layer.weight", (64, 64), torch.float32)
    kept = sum(slot.nbytes for slot in cls().slots(spec).values())
    return {
        "name": cls.name,
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        "formula": cls.formula,
        "paper": cls.paper,
        "bytes_per_parameter": kept / spec.numel,
        "order_independent": cls.order_independent,
        "subtractable": cls.subtractable,
        "needs": list(cls().needs),
        "parameters": {
            name: {"default": about["default"], "help": about["help"], "range": param_range(about)}
            for name, about in method_params(cls).items()
        },
    }


def _value(default: Any) -> str:
    return ",".join(default) if isinstance(default, tuple) else str(default)
