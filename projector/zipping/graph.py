"""A model's graph, as far as zipping asks for it: nodes, each a set of features that are zipped as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from projector.errors import BadParameter, BadSchema, Reason
from projector.spec import Schema
from projector.text import listed, shown

PAGE = "docs/zipit.md has the form of a graph"


@dataclass(frozen=True)
class Reading:
    """An axis of a tensor that reads features. each: how many of its entries, side by side, stand for one."""

    axis: int
    each: int = 1


@dataclass(frozen=True)
class Place:
    """Where in the running model features are: what goes into a module or comes out of it, along an axis."""

    module: str
    output: bool
    axis: int = -1


@dataclass(frozen=True)
class Node:
    """Features that are zipped as one.

    made: the tensors that make them or scale them one by one, and along which axis. read: the tensors that read them.
    averaged: tensors that lie before them, and are of no node.
    """

    name: str
    places: Sequence[Place]
    made: Mapping[str, int]
    read: Mapping[str, Reading]
    averaged: Sequence[str] = ()


@dataclass(frozen=True)
class Graph:
    """Nodes in the order of the model. one_base: it takes it that features outside of nodes are the same ones in all
    models, as in models that were fine-tuned from one base.
    """

    nodes: Sequence[Node]
    one_base: bool = False

    def upto(self, name: str | None) -> "Graph":
        """The nodes up to that one, where what they make can be shared without what lies behind; all for None.

        Raises BadParameter.
        """
        if name is None:
            return self
        names = [node.name for node in self.nodes]
        if name not in names:
            raise BadParameter(f"the graph has no node {shown(name)}", f"name one of {listed(names, most=40)}")
        count = names.index(name) + 1
        if across := self._across(count):
            good = [names[n - 1] for n in range(1, len(names) + 1) if not self._across(n)]
            raise BadParameter(
                f"no model can be cut behind {shown(name)}: {across}",
                f"stop at {listed(good, most=40)}, or zip it whole" if good else "zip it whole, without --to",
            )
        return Graph(self.nodes[:count], self.one_base)

    def _across(self, count: int) -> str:
        """Why the first nodes cannot be shared without the others; empty where they can."""
        for node in self.nodes[:count]:
            for tensor in (*node.made, *node.averaged):
                for later in self.nodes[count:]:
                    if tensor in later.read:
                        return f"{shown(tensor)} makes {shown(node.name)} of {shown(later.name)}, which comes later"
        return ""

    def sizes(self, schema: Schema) -> dict[str, int]:
        """How many features each node has. Raises BadSchema where the graph does not fit these tensors."""
        taken: dict[tuple[str, int], str] = {}
        for node in self.nodes:
            for name, axis in [*node.made.items(), *((name, one.axis) for name, one in node.read.items())]:
                if (name, axis) in taken:
                    raise _unfit(f"axis {axis} of {shown(name)} is of two: {taken[name, axis]} and {node.name}")
                taken[name, axis] = node.name
                if name not in schema:
                    raise BadSchema(
                        Reason.MISSING_TENSOR, f"{node.name}: the model has no tensor {shown(name)}", f"mend it: {PAGE}"
                    )
                if not 0 <= axis < len(schema[name].shape):
                    raise _unfit(f"{node.name}: {shown(name)} has no axis {axis}, being {list(schema[name].shape)}")
            for name in node.averaged:
                if name not in schema:
                    raise BadSchema(
                        Reason.MISSING_TENSOR, f"{node.name}: the model has no tensor {shown(name)}", f"mend it: {PAGE}"
                    )
        making = [name for node in self.nodes for name in node.made]
        if twice := sorted({name for name in making if making.count(name) > 1}):
            raise _unfit(f"{listed(twice)} makes two nodes")
        return {node.name: _size(node, schema) for node in self.nodes}

    def described(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "one_base": self.one_base,
            "nodes": [
                {
                    "name": node.name,
                    "features": [
                        {"output_of" if place.output else "input_of": place.module, "axis": place.axis}
                        for place in node.places
                    ],
                    "made": dict(node.made),
                    "read": {
                        name: one.axis if one.each == 1 else {"axis": one.axis, "each": one.each}
                        for name, one in node.read.items()
                    },
                    "averaged": list(node.averaged),
                }
                for node in self.nodes
            ],
        }


def _size(node: Node, schema: Schema) -> int:
    lengths = {name: schema[name].shape[axis] for name, axis in node.made.items()}
    for name, one in node.read.items():
        length = schema[name].shape[one.axis]
        if length % one.each:
            raise _unfit(f"{node.name}: axis {one.axis} of {shown(name)} is {length}, not a multiple of {one.each}")
        lengths[name] = length // one.each
    if len({*lengths.values()}) > 1:
        said = ", ".join(f"{shown(name)} {length}" for name, length in lengths.items())
        raise _unfit(f"{node.name} is not of one size: {said}")
    return next(iter(lengths.values()))


def _unfit(detail: str) -> BadSchema:
    return BadSchema(Reason.WRONG_SHAPE, detail, f"mend the graph: {PAGE}")


def parse_graph(value: Any) -> Graph:
    """A graph from what JSON has, as `described` gives it. Raises BadParameter."""
    top = _fields(value, "the graph", {"nodes"}, {"one_base"})
    found = tuple(_node(one, number) for number, one in enumerate(_of(list, top["nodes"], "nodes")))
    if not found:
        raise BadParameter("the graph has no node", PAGE)
    names = [node.name for node in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BadParameter(f"several nodes are called {listed(twice)}", "give each a name of its own")
    return Graph(found, _of(bool, top.get("one_base", False), "one_base"))


def _node(value: Any, number: int) -> Node:
    where = f"node {number}"
    fields = _fields(value, where, {"name", "features", "made", "read"}, {"averaged"})
    name = _of(str, fields["name"], f"{where}: name")
    places = fields["features"] if isinstance(fields["features"], list) else [fields["features"]]
    made = {tensor: _of(int, axis, f"{name}: made") for tensor, axis in _of(dict, fields["made"], name).items()}
    read = {tensor: _reading(one, f"{name}: read") for tensor, one in _of(dict, fields["read"], name).items()}
    if not places or not made or not read:
        raise BadParameter(f"{shown(name)} has no features, or nothing makes or reads them", PAGE)
    averaged = tuple(_of(str, one, f"{name}: averaged") for one in _of(list, fields.get("averaged", []), name))
    return Node(name, tuple(_place(one, name) for one in places), made, read, averaged)


def _place(value: Any, where: str) -> Place:
    fields = _fields(value, f"{where}: features", set(), {"input_of", "output_of", "axis"})
    named = [key for key in ("input_of", "output_of") if key in fields]
    if len(named) != 1:
        raise BadParameter(f"{where}: features are the input_of or the output_of one module", PAGE)
    module = _of(str, fields[named[0]], f"{where}: {named[0]}")
    return Place(module, named[0] == "output_of", _of(int, fields.get("axis", -1), f"{where}: axis"))


def _reading(value: Any, where: str) -> Reading:
    if not isinstance(value, dict):
        return Reading(_of(int, value, where))
    fields = _fields(value, where, {"axis"}, {"each"})
    each = _of(int, fields.get("each", 1), where)
    if each < 1:
        raise BadParameter(f"{where}: each = {each}", "give how many entries stand for one feature, 1 or more")
    return Reading(_of(int, fields["axis"], where), each)


def _fields(value: Any, where: str, needed: set[str], more: set[str]) -> dict[str, Any]:
    fields: dict[str, Any] = _of(dict, value, where)
    if missing := sorted(needed - fields.keys()):
        raise BadParameter(f"{where} has no {listed(missing)}", PAGE)
    if unknown := sorted(fields.keys() - needed - more):
        raise BadParameter(f"{where} has an unknown {listed(unknown)}", PAGE)
    return fields


def _of(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadParameter(f"{where}: {shown(repr(value))} is no {kind.__name__}", PAGE)
    return value
