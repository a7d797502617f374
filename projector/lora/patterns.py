"""The patterns for modules' names in an adapter's config: what PEFT takes from them, in a time that is known before.

PEFT takes the first pattern for which re.match(rf"(.*\\.)?({pattern})$", module) matches. Python's `re` goes back over
what it has tried, which on a long name can take for ever. Here names as they stand are looked up, and the rest is
matched by the engine of pydantic, Rust's, in a time that grows with the length of the pattern times that of the name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pydantic_core import SchemaError, SchemaValidator, core_schema

from projector.errors import BadSchema, Reason
from projector.text import shown

MAX_PATTERNS = 4096
MAX_PATTERN = 300  # characters
MAX_EXPRESSIONS = 256  # patterns that are more than a name
MAX_LETTERS = 4096  # of a pattern or of a module's name, once a{3} is aaa
MAX_ALL_LETTERS = 4 * MAX_LETTERS  # of all patterns together
MAX_STEPS = 1 << 29  # letters of names x letters of patterns, of one adapter: seconds at most

FIXED = re.compile(r"(?P<start>\^?)(?P<name>(?:[^\\\[\]{}()|*+?^$]|\\[^\w\s])+)\$?")
"""A name as it stands; a dot in it is any letter, as in any pattern."""

PIECE = re.compile(
    r"""
      (?P<letter> [^\\\[\]{}()|*+?] | \\[dDwWsS] | \\[^\w\s] | \[\^?(?:[^\[\]\\]|\\[dDwWsS.\-])+\] )
      (?P<repeat> [*+?] | \{(?P<least>\d{1,3})(?:,(?P<most>\d{0,3}))?\} )? (?P<lazy> (?(repeat) \?? ) )
    | (?P<open> \((?:\?:)? ) | (?P<close> \)\?? ) | (?P<bar> \| )
    """,
    re.VERBOSE,
)
"""What a pattern may be made of. Everything else (look-around, flags, back references, repeated groups) two engines may
read in two ways, or one of them not at all."""

CLASSES = {
    ".": r"[\x00-\t\x0b-\x7f]",
    r"\d": "[0-9]",
    r"\w": "[0-9A-Za-z_]",
    r"\s": r"[ \t-\r\x1c-\x1f]",
    r"\D": "[^0-9]",
    r"\W": "[^0-9A-Za-z_]",
    r"\S": r"[^ \t-\r\x1c-\x1f]",
}
"""What they are of a name in ASCII."""


@dataclass(frozen=True)
class _Name:
    """A pattern of one length: `text` with the letters at `free` being any."""

    place: int  # among all patterns
    text: str
    free: frozenset[int]
    whole: bool  # the module's whole name, not the end of it

    def matches(self, end: str) -> bool:
        return all(a == b or at in self.free for at, (a, b) in enumerate(zip(self.text, end, strict=True)))


@dataclass(frozen=True)
class _Expression:
    """Any other pattern, for Rust's engine; `letters` is its length."""

    place: int
    letters: int
    engine: SchemaValidator


class Expression:
    """A pattern for the whole name of a module, as re.fullmatch takes it."""

    def __init__(self, letters: int, engine: SchemaValidator) -> None:
        self._letters = letters
        self._engine = engine
        self._steps = 0

    def matches(self, module: str) -> bool | None:
        """None where a name cannot be held against it, or all of them together take too long."""
        self._steps += (len(module) + 1) * self._letters
        if "\n" in module or not module.isascii() or len(module) > MAX_LETTERS or self._steps > MAX_STEPS:
            return None
        return self._engine.isinstance_python(module)


def whole(pattern: str) -> Expression | None:
    """The pattern for whole names; None where it is none that is understood here."""
    if len(pattern) > MAX_LETTERS:
        return None
    try:
        return Expression(*_translated(pattern, "^(?:{})$"))
    except BadSchema:
        return None


@dataclass
class _Names:
    """The patterns of one length, to be looked up."""

    first: dict[tuple[str, bool], int] = field(default_factory=dict)
    by_dots: dict[int, list[_Name]] = field(default_factory=dict)


class Patterns:
    """Values by pattern. Raises BadSchema where a pattern is none that is understood here, or there are too many."""

    def __init__(self, values: Mapping[str, float]) -> None:
        if len(values) > MAX_PATTERNS:
            raise _bad(f"it has {len(values)} patterns, {MAX_PATTERNS} are allowed")
        self._values = list(values.values())
        self._names: dict[int, _Names] = {}
        self._expressions: list[_Expression] = []
        self._found: dict[str, int | None] = {}
        self._steps = 0
        for place, pattern in enumerate(values):
            self._add(place, pattern)
        letters = sum(one.letters for one in self._expressions)
        if len(self._expressions) > MAX_EXPRESSIONS or letters > MAX_ALL_LETTERS:
            raise _bad(
                f"{len(self._expressions)} of its patterns are no plain names, which could take for ever to match"
            )

    def first(self, module: str, default: float) -> float:
        """The value of the first pattern that matches the module's name; `default` where none does.

        Raises BadSchema where a name cannot be held against the patterns, or all of them together take too long.
        """
        if not self._values:
            return default
        if module not in self._found:
            self._found[module] = min(self._matching(module), default=None)
        place = self._found[module]
        return default if place is None else self._values[place]

    def _add(self, place: int, pattern: str) -> None:
        if len(pattern) > MAX_PATTERN:
            raise _bad(f"the pattern {shown(pattern)} has {len(pattern)} letters, {MAX_PATTERN} are allowed")
        if fixed := FIXED.fullmatch(pattern):
            letters = re.findall(r"\\?.", fixed["name"], re.DOTALL)
            text = "".join(letter[-1] for letter in letters)
            free = frozenset(at for at, letter in enumerate(letters) if letter == ".")
            name = _Name(place, text, free, bool(fixed["start"]))
            names = self._names.setdefault(len(text), _Names())
            names.first.setdefault((text, name.whole), place)
            if free:
                names.by_dots.setdefault(text.count("."), []).append(name)
        else:
            self._expressions.append(_Expression(place, *_translated(pattern)))

    def _matching(self, module: str) -> Iterator[int]:
        """The places of patterns that match, the first of them among these."""
        if "\n" in module or (self._expressions and not module.isascii()) or len(module) > MAX_LETTERS:
            raise _bad(f"{shown(module)} is no module's name that a pattern can be held against")
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", module))):
            if names := self._names.get(len(module) - start):
                yield from self._ending(names, module[start:], start == 0)
        for expression in self._expressions:
            self._spend((len(module) + 1) * expression.letters, module)
            if expression.engine.isinstance_python(module):
                yield expression.place
                return  # they are in order

    def _ending(self, names: _Names, end: str, whole: bool) -> Iterator[int]:
        yield from (names.first[key] for key in ((end, False), (end, whole)) if key in names.first)
        dots = end.count(".")
        for count, alike in names.by_dots.items():
            if count > dots:  # one of its dots is another letter here
                self._spend(len(alike) * len(end), end)
                yield from (one.place for one in alike if one.whole <= whole and one.matches(end))

    def _spend(self, steps: int, name: str) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise _bad(f"its patterns could take for ever to match: {MAX_STEPS} steps were not enough at {shown(name)}")


def _translated(pattern: str, frame: str = r"^(?:.*\.)?(?:{})$") -> tuple[int, SchemaValidator]:
    """How many letters the pattern has once repetitions are written out, and itself, for Rust's engine.

    frame: what stands around it, which says how much of a name it is for.
    """
    unknown = _bad(f"the pattern {shown(pattern)} is no regular expression, or one that is not known here")
    letters, place, parts = 0, 0, []
    for piece in PIECE.finditer(pattern):
        if piece.start() != place:
            raise unknown
        place = piece.end()
        if letter := piece["letter"]:
            if letter[0] == "[" and re.search("&&|--|~~", letter):
                raise unknown
            letters += max(1, int(piece["least"] or 0), int(piece["most"] or 0))
            parts.append(_letter(letter) + (piece["repeat"] or "") + piece["lazy"])
        else:
            letters += 1
            parts.append(piece[0])
    if place < len(pattern) or letters > MAX_LETTERS:
        raise unknown
    try:
        re.compile(pattern)
        framed = frame.replace("{}", "".join(parts))
        return letters, SchemaValidator(core_schema.str_schema(pattern=framed, strict=True))
    except (re.error, OverflowError, RecursionError, SchemaError):
        raise unknown from None


def _letter(letter: str) -> str:
    """One letter, or a class of them, as Rust's engine has it."""
    if letter[0] == "[":
        return re.sub(r"\\[dDwWsS]", lambda found: CLASSES[found[0]], letter)
    if letter[0] == "\\":
        return CLASSES.get(letter) or f"\\x{{{ord(letter[1]):x}}}"
    return CLASSES.get(letter, letter)


def _bad(detail: str) -> BadSchema:
    hint = "write the modules' names into rank_pattern and alpha_pattern of adapter_config.json instead"
    return BadSchema(Reason.UNEXPECTED_TENSOR, detail, hint)
