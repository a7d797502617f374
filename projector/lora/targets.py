"""Which modules PEFT puts an adapter into, by its config: what the file has for others, PEFT leaves out silently."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from projector.lora.patterns import Expression, whole

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Targets:
    """The fields of adapter_config.json by these names. None, and what is not understood for sure, says nothing.

    A string is a regular expression for the whole name of a module; each of a list is a name, or the end of one behind
    a dot. layers: layers_to_transform, without a layers_pattern.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers: Sequence[int] | None = None

    def leaves_out(self, module: str) -> bool:
        """True where PEFT would not put an adapter into this module."""
        if _is_among(module, self._excluded, False):
            return True
        if not _is_among(module, self._targeted, True):
            return True
        if not self.layers or isinstance(self.target_modules, str) or module in (self.target_modules or ()):
            return False
        parts = module.split(".")
        numbers = {int(part) for part in parts[2:-1] if part.isascii() and part.isdigit()}
        return not numbers or (len(numbers) == 1 and numbers.isdisjoint(self.layers))

    @cached_property
    def _targeted(self) -> Expression | frozenset[str] | None:
        return _read(self.target_modules)

    @cached_property
    def _excluded(self) -> Expression | frozenset[str] | None:
        return _read(self.exclude_modules)


def _read(said: str | Sequence[str] | None) -> Expression | frozenset[str] | None:
    if isinstance(said, str):
        return None if said == ALL_LINEAR else whole(said)
    return frozenset(said) if said else None


def _is_among(module: str, read: Expression | frozenset[str] | None, unsaid: bool) -> bool:
    """unsaid: what it is taken for where nothing is said."""
    if read is None:
        return unsaid
    if isinstance(read, frozenset):
        return any(module[at:] in read for at in (0, *(at + 1 for at, letter in enumerate(module) if letter == ".")))
    found = read.matches(module)
    return unsaid if found is None else found
