"""What an adapter's config decides about its deltas: ranks, scalings, and how its factors lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt

from projector.lora.patterns import Patterns
from projector.lora.targets import Targets

MERGE_FIRST = "merge it into its base first (peft: model.merge_and_unload()) and drop the whole model"


@dataclass(frozen=True)
class LoraConfig:
    """The settings of a PEFT LoRA adapter that its deltas depend on, by the names that PEFT has for them.

    rank_pattern, alpha_pattern: what replaces `r` and `lora_alpha` in some modules (see `scaling`).
    trainable_token_indices: rows of an embedding, by the end of its module's name; "" stands for the only one there is.
    targets: which modules have a LoRA at all.
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
    targets: Targets = field(default_factory=Targets)

    def rank(self, module: str) -> int:
        """The rank of this module's factors: of the first pattern that it matches, else `r`."""
        return int(self._ranks.first(module, self.r))

    def scaling(self, module: str) -> float:
        """What its B A is multiplied by: alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised.

        A pattern is a regular expression for a module's name or for the end of it, behind a dot.

        >>> config = LoraConfig(r=8, lora_alpha=16, rank_pattern={"q": 2}, alpha_pattern={r"1\\.q": 3})
        >>> [config.scaling(module) for module in ("layers.0.q", "layers.1.q", "layers.1.kq")]
        [8.0, 1.5, 2.0]
        """
        rank = self.rank(module)
        return self._alphas.first(module, self.lora_alpha) / (sqrt(rank) if self.use_rslora else rank)

    def says(self, module: str) -> tuple[int, float]:
        """(rank, scaling) of this module."""
        return self.rank(module), self.scaling(module)

    def tokens(self, module: str) -> Sequence[int]:
        """The rows of this embedding that the adapter replaces."""
        indices = self.trainable_token_indices
        ends = [end for end in indices if not end or module == end or module.endswith(f".{end}")]
        return indices[ends[0]] if ends else ()

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)
