"""How deep in its network a tensor lies, as the numbers in names tell."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

PLACE = re.compile(r"(?P<word>.*(?:layer|block|stage)s?_?)?(?P<number>\d+)")
APART = frozenset({"experts"})  # stand beside each other


@dataclass(frozen=True)
class Layers:
    """A list of layers: what its tensors' names begin with, its first and its last number, the numbers of these, and
    the names of the tensors in it with their number."""

    name: str
    first: int
    last: int
    tensors: Mapping[str, int]

    def share(self, name: str) -> float:
        """How far down the list a tensor of it lies, in [0, 1]."""
        return (self.tensors[name] - self.first) / (self.last - self.first)


def layers(names: Iterable[str]) -> Sequence[Layers]:
    """The lists of layers that these names tell of, in the order in which they come.

    A number that is a whole part of a name, between dots, tells a layer, and so does one behind "layer", "block" or
    "stage": `encoder.layer.3`, `h.3`, `layer3`, `encoder_layer_3`. A list has two numbers or more; what lies in several
    is of the outermost, and the two towers of a model are two lists. A mixture's experts are none, and the parts of a
    pipeline, whose number begins the name, are one only where there is nothing else.

    >>> [(found.name, found.first, found.last) for found in layers(["h.0.ln.weight", "h.1.mlp.0.weight", "wte.weight"])]
    [('h', 0, 1)]
    """
    places = {name: list(_places(name)) for name in names}
    numbers: dict[str, set[int]] = {}
    for found in places.values():
        for within, number in found:
            numbers.setdefault(within, set()).add(number)
    members: dict[str, dict[str, int]] = {}
    for name, found in places.items():
        for within, number in sorted(found, key=lambda place: not place[0]):  # the sort is stable: outermost first
            if len(numbers[within]) > 1:
                members.setdefault(within, {})[name] = number
                break
    return [Layers(within, min(numbers[within]), max(numbers[within]), tensors) for within, tensors in members.items()]


def depths(names: Iterable[str]) -> dict[str, float]:
    """Of each tensor that lies in a list of layers, how far down it does: 0 in the first layer, 1 in the last."""
    return {name: found.share(name) for found in layers(names) for name in found.tensors}


def _places(name: str) -> Iterator[tuple[str, int]]:
    """(list, number) of each number in the name that may tell a layer, from the outermost on."""
    start = 0
    for part in name.split("."):
        found = PLACE.fullmatch(part) if part[-1:].isdecimal() and part.isascii() else None
        before = name[:start].rstrip(".")
        if found and before.rpartition(".")[2] not in APART:
            yield name[: start + len(found["word"] or "")].rstrip("._"), int(found["number"])
        start += len(part) + 1
