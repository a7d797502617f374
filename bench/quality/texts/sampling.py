"""A balanced choice of texts, and a training and a test part that have nothing in common."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

TRAIN, TEST = 4000, 1000  # texts of a task, at most
LEAST = 90  # texts of a class: with fewer it is no class
BATCH = 16  # items without their labels, as many as AdaMerging's authors take


@dataclass(frozen=True)
class Part:
    """Texts, and the number of each one's class."""

    texts: Sequence[str]
    labels: Sequence[int]

    def first(self, count: int) -> "Part":
        """The first ones: they lie in no order."""
        return Part(self.texts[:count], self.labels[:count])

    def where(self, classes: Sequence[int]) -> "Part":
        """What is of these classes; the numbers stay."""
        kept = [(text, label) for text, label in zip(self.texts, self.labels, strict=True) if label in classes]
        return Part([text for text, _ in kept], [label for _, label in kept])


@dataclass(frozen=True)
class Texts:
    """A task's classes, what is trained on and what is scored on."""

    classes: Sequence[str]
    train: Part
    test: Part


def sampled(name: str, found: Mapping[str, Iterable[str | tuple[str, Hashable]]]) -> Texts:
    """found: by class, its texts; of (text, group) pairs, a whole group falls on one side. A text that several classes
    have is left out. The same for the same name and texts, whatever their order.
    """
    pairs = {
        label: dict(one if isinstance(one, tuple) else (one, one) for one in texts) for label, texts in found.items()
    }
    counts: dict[str, int] = {}
    for texts in pairs.values():
        for text in texts:
            counts[text] = counts.get(text, 0) + 1
    own = {label: {t: g for t, g in texts.items() if counts[t] == 1 and t.strip()} for label, texts in pairs.items()}
    draw = Random(name)
    classes = sorted(own)
    per_class = min(min(len(own[label]) for label in classes), (TRAIN + TEST) // len(classes))
    if per_class < LEAST:
        raise ValueError(f"{name}: {[(label, len(own[label])) for label in classes]}")
    groups = sorted({group for texts in own.values() for group in texts.values()}, key=str)
    draw.shuffle(groups)
    to_test = set(groups[: len(groups) * TEST // (TRAIN + TEST)])
    train: list[tuple[str, int]] = []
    test: list[tuple[str, int]] = []
    for number, label in enumerate(classes):
        texts = sorted(own[label])
        draw.shuffle(texts)
        sides = (
            [text for text in texts if own[label][text] in to_test],
            [text for text in texts if own[label][text] not in to_test],
        )
        test += [(text, number) for text in sides[0][: per_class * TEST // (TRAIN + TEST)]]
        train += [(text, number) for text in sides[1][: per_class * TRAIN // (TRAIN + TEST)]]
    draw.shuffle(train)
    draw.shuffle(test)
    return Texts(classes, _part(train), _part(test))


def unlabelled(task: str, step: int, count: int) -> list[int]:
    """The places of one batch among so many items: what a step learns from without labels. Always the same."""
    return Random(f"{task} {step}").sample(range(count), BATCH)


def _part(pairs: Sequence[tuple[str, int]]) -> Part:
    return Part([text for text, _ in pairs], [label for _, label in pairs])
