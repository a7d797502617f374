"""What an adapter's config decides about its deltas: ranks, scalings, and how its factors lie."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf, sqrt

from projector.errors import BadSchema, Reason
from projector.text import shown

MERGE_FIRST = "merge it into its base first (peft: model.merge_and_unload()) and drop the whole model"
MAX_PATTERNS = 4096
MAX_PATTERN = 300  # characters
MAX_REPEATS = MAX_GROUPS = 3  # in one pattern
LETTERS = 64  # of a module's name: what one repetition multiplies the steps of a match by
MAX_STEPS = 1 << 20  # of all patterns together on one name

PIECE = re.compile(
    r"""
      (?: [^\\\[\]{}()|*+?] | \\[dDwWsS] | \\[^\w\s] | \[\^?(?:[^\[\]\\]|\\[dDwWsS.\-])+\] )  # one letter
      (?P<repeat> [*+?] | \{\d{1,3}(?:,\d{0,3})?\} )? (?(repeat) \?? )
    | (?P<open> \((?:\?:)? ) | (?P<close> \)\?? ) | (?P<bar> \| )
    """,
    re.VERBOSE,
)
"""What a pattern may be made of: everything else (look-around, flags, back references) could hide what it costs."""

Patterns = Sequence[tuple[re.Pattern[str], float]]


@dataclass(frozen=True)
class LoraConfig:
    """The settings of a PEFT LoRA adapter that its deltas depend on, by the names that PEFT has for them.

    rank_pattern, alpha_pattern: what replaces `r` and `lora_alpha` in some modules (see `scaling`).
    trainable_token_indices: rows of an embedding, by the end of its module's name; "" stands for the only one there is.
    """

    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    use_dora: bool = False
    trainable_token_indices: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def rank(self, module: str) -> int:
        """The rank of this module's factors: of the first pattern that it matches, else `r`."""
        return int(_first(self._ranks, module, self.r))

    def scaling(self, module: str) -> float:
        """What its B A is multiplied by: alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised.

        A pattern is a regular expression for a module's name or for the end of it, behind a dot.

        >>> config = LoraConfig(r=8, lora_alpha=16, rank_pattern={"q": 2}, alpha_pattern={r"1\\.q": 3})
        >>> [config.scaling(module) for module in ("layers.0.q", "layers.1.q", "layers.1.kq")]
        [8.0, 1.5, 2.0]
        """
        rank = self.rank(module)
        return _first(self._alphas, module, self.lora_alpha) / (sqrt(rank) if self.use_rslora else rank)

    def tokens(self, module: str) -> Sequence[int]:
        """The rows of this embedding that the adapter replaces."""
        indices = self.trainable_token_indices
        ends = [end for end in indices if not end or module == end or module.endswith(f".{end}")]
        return indices[ends[0]] if ends else ()

    @cached_property
    def _ranks(self) -> Patterns:
        return compiled(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return compiled(self.alpha_pattern)


def compiled(patterns: Mapping[str, float]) -> Patterns:
    """The patterns, ready to match. Raises BadSchema where one is no regular expression, or could take for ever."""
    if len(patterns) > MAX_PATTERNS:
        raise _bad(f"it has {len(patterns)} patterns, {MAX_PATTERNS} are allowed")
    found = []
    steps = 0.0
    for pattern, value in patterns.items():
        steps += _steps(pattern)
        if steps > MAX_STEPS:
            raise _bad(f"the pattern {shown(pattern)} could take for ever to match, or is no regular expression")
        try:
            found.append((re.compile(rf"(.*\.)?({pattern})$"), value))
        except (re.error, OverflowError, RecursionError):
            raise _bad(f"the pattern {shown(pattern)} is no regular expression") from None
    return found


def _steps(pattern: str) -> float:
    """How many steps a match may take, about; infinite where that cannot be told.

    Every repetition multiplies them by the letters of a name, every group by its alternatives; no group is repeated.
    """
    if len(pattern) > MAX_PATTERN:
        return inf
    steps, repeats, groups, place = 1, 0, 0, 0
    alternatives = [1]  # of each group that is open
    for piece in PIECE.finditer(pattern):
        if piece.start() != place:
            return inf
        place = piece.end()
        if repeat := piece["repeat"]:
            repeats += 1
            steps *= 2 if repeat == "?" else LETTERS
        elif piece["open"]:
            groups += 1
            alternatives.append(1)
        elif piece["bar"]:
            alternatives[-1] += 1
        elif piece["close"]:
            repeats += piece["close"] != ")"
            steps *= alternatives.pop() + 1
            if not alternatives:
                return inf
    if place < len(pattern) or repeats > MAX_REPEATS or groups > MAX_GROUPS:
        return inf
    return steps * alternatives[0]


def _first(patterns: Patterns, module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)


def _bad(detail: str) -> BadSchema:
    hint = "write the modules' names into rank_pattern and alpha_pattern of adapter_config.json instead"
    return BadSchema(Reason.UNEXPECTED_TENSOR, detail, hint)
