"""The tasks by name, and their texts, kept in the cache as they were drawn."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from bench.quality.cache import make_once, note
from bench.quality.texts import names, passages, words
from bench.quality.texts.sampling import Part, Texts

TASKS: Mapping[str, Callable[[], Texts]] = {
    one.__name__: one
    for one in (
        words.language,
        passages.diagnosis,
        names.gender,
        passages.code_line,
        words.syllables,
        names.city,
        passages.verse,
        words.form,
        passages.compound,
        names.person,
        words.spelling,
        passages.identifier,
        words.rhyme,
        names.kind,
        words.symbol,
        words.sentiment,
        names.tongue,
        words.frequency,
        names.first_name,
    )
}
"""In the order in which experts are trained and, unless another is drawn, arrive."""


def texts_of(name: str, cache: Path) -> Texts:
    """Drawn once."""
    path = cache / "texts" / f"{name}.json"
    make_once(path, lambda: note(asdict(TASKS[name]()), path))
    found = json.loads(path.read_text())
    return Texts(found["classes"], Part(**found["train"]), Part(**found["test"]))
