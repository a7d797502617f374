"""The model card of a version, README.md: text from data alone, the same bytes for the same version.

Whatever a trainer could have chosen (names of experts, of the base) is shown, and can be nothing else: every value that
the template prints has its punctuation as numeric character references, which Markdown and HTML take for text and never
for structure. The YAML at the head holds only words that were held against a pattern. The time of publication is left
to manifest.json: a version that is made again after a crash then has the same card.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from daemon.checkpoints.weight_names import SUFFIX, weight_names
from daemon.layout import is_weights
from daemon.manifest import Withdrawal
from projector.method import Method
from projector.text import shown
from registry.records import BaseModel, NewExpert, Scores

MOST_EXPERTS = 100  # rows of the table: the newest; the lineage has all
FRONT_MATTER_BYTES = 64 << 10
_FENCE = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t\r]*$", re.DOTALL | re.MULTILINE)
_LICENSE_FIELDS = {
    "license": re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}"),
    "license_name": re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,63}"),
    "license_link": re.compile(r"https://[A-Za-z0-9./_%~+-]{1,200}|[A-Za-z0-9][A-Za-z0-9._-]{0,63}"),
}
_REPOSITORY = re.compile(r"(\w([\w.-]*\w)?/)?\w([\w.-]*\w)?", re.ASCII)
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CLASS_NAME = re.compile(r"[A-Z][A-Za-z0-9]{0,99}")
# what is left as it is: letters, digits, blanks, and of punctuation what means nothing where it stands
_MARKUP = re.compile(r"(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=[Ww]{3})\.|[^A-Za-z0-9 ._,'()/+\-\x80-\U0010ffff]")


class Verbatim(str):
    """Text of our own, or held against a pattern: it is printed as it stands."""


@dataclass(frozen=True)
class AboutBase:
    """What the base's own files say of it. Each may be missing.

    license: the front matter's license fields. library: the one that loads it, by its name on the hub. architecture:
    the library's class.
    """

    license: Mapping[str, str]
    library: str | None = None
    architecture: str | None = None


@dataclass(frozen=True)
class Card:
    """Everything that a card says.

    newest: its experts, newest first, MOST_EXPERTS of them at the most. files: those of its weights. adapter: the rank
    of the one beside the weights, and the share of the task vector's squared norm that it keeps. adamerging: how
    the coefficients of its weights were learned, where they were. relative: a task vector is what was trained since the
    version that an expert names.
    """

    head: str
    number: int
    method: Method
    base: BaseModel
    about: AboutBase
    experts: int
    newest: Sequence[NewExpert]
    figures: Mapping[str, float]
    dtype: str
    approximate: bool = False
    relative: bool = False
    withdrawal: Withdrawal | None = None
    files: Sequence[str] = ()
    adapter: tuple[int, float] | None = None
    adamerging: Mapping[str, Any] | None = None
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True)
class RoutedCard:
    """What the card of an exported model with routed layers says. name: the version's. experts: those that it chooses
    among, the oldest first. evicted: how many more are in the weights beneath.
    """

    name: str
    base: BaseModel
    about: AboutBase
    experts: Sequence[NewExpert]
    evicted: int


def escaped(text: str) -> str:
    """Text as it reads the same in Markdown, in a table's cell too, and in HTML.

    >>> escaped("<b>|*a_b*")
    '&#60;b&#62;&#124;&#42;a_b&#42;'
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)


def as_code(text: str, ends: str = "`\n") -> Verbatim:
    """Text as a code span, which is easier to read than references; escaped where it holds what could end the span."""
    return Verbatim(escaped(text) if set(ends) & set(text) or not text.strip() else f"`{text}`")


def render(card: Card) -> bytes:
    """The bytes of README.md."""
    text = _TEMPLATES.get_template("card.md.j2").render(
        card=card,
        formula=as_code(card.method.formula),
        front=Verbatim(_fields(card.base, card.about, merged=card.experts > 0)),
        params=[(name, as_code(json.dumps(value), ends="`\n|")) for name, value in card.method.params().items()],
        scores=[
            (shown(task), f"{one.score:.6g}", "" if one.higher_is_better else "lower is better", one.n or "-")
            for task, one in card.scores.items()
        ],
        figures=[(name, f"{value:.6g}") for name, value in card.figures.items()],
        rows=[
            (card.experts - place, shown(_called(one)), shown(_task(one)), f"{one.weight:g}", one.sha256)
            for place, one in enumerate(card.newest)
        ],
        tasks=any(_task(one) != "-" for one in card.newest),
        weights=_weights(card.files),
        variant=weight_names(card.files).variant,
        withdrawn=[(shown(_called(one)), one.sha256) for one in _first(card.withdrawal)],
        more_withdrawn=max(0, len(card.withdrawal.experts) - MOST_EXPERTS) if card.withdrawal else 0,
        architecture=Verbatim(card.about.architecture or ""),
    )
    return text.encode()


def render_routed(card: RoutedCard) -> bytes:
    """The bytes of README.md beside a model with routed layers."""
    text = _TEMPLATES.get_template("routed.md.j2").render(
        card=card,
        front=Verbatim(_fields(card.base, card.about, merged=True)),
        rows=[(shown(_called(one)), shown(_task(one)), one.sha256) for one in card.experts],
    )
    return text.encode()


def _weights(files: Sequence[str]) -> Verbatim:
    """The one file that the weights are in, as it may stand in a program; else a glob of all of them."""
    named = [name for name in files if is_weights(name) and name.endswith(SUFFIX)]
    return Verbatim(named[0] if len(named) == 1 and _FILE_NAME.fullmatch(named[0]) else f"*{SUFFIX}")


def about_base(readme: bytes, config: bytes, names: Sequence[str]) -> AboutBase:
    """What the base's README.md and config.json say (nothing where they are empty), and the names of its files."""
    said = _config(config)
    architectures = said.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    library = None
    if "modules.json" in names:
        library = "sentence-transformers"
    elif "_diffusers_version" in said:
        library, first = "diffusers", said.get("_class_name")
    elif "transformers_version" in said or first:
        library = "transformers"
    named = isinstance(first, str) and _CLASS_NAME.fullmatch(first)
    return AboutBase(_license(readme), library, first if named else None)


def _license(readme: bytes) -> dict[str, str]:
    """The license fields of a card's front matter, of those that are plain words.

    The front matter is read line by line and not as YAML: three words of it are wanted, from a file of any origin.
    """
    front = _FENCE.search(readme[:FRONT_MATTER_BYTES].decode(errors="replace"))
    found = {}
    for line in front[1].splitlines() if front else ():
        key, colon, value = line.partition(":")
        word = value.strip().strip("'\"")
        if colon and key in _LICENSE_FIELDS and _LICENSE_FIELDS[key].fullmatch(word):
            found[key] = word
    return found


def _config(config: bytes) -> Mapping[str, Any]:
    try:
        said = json.loads(config)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _fields(base: BaseModel, about: AboutBase, *, merged: bool) -> str:
    """The front matter's lines."""
    fields: dict[str, Any] = {}
    if _is_repository(base.name):
        fields["base_model"] = base.name
        if merged:
            fields["base_model_relation"] = "merge"
    if about.library:
        fields["library_name"] = about.library
    fields |= about.license
    fields["tags"] = ["merge", "mainstem"] if merged else ["mainstem"]
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in fields.items())  # JSON is YAML


def _is_repository(name: str) -> bool:
    """True for what can be a model's name on the hub; the name of a single file cannot."""
    odd = "--" in name or ".." in name or name.endswith((".git", ".safetensors"))
    return len(name) <= 96 and _REPOSITORY.fullmatch(name) is not None and not odd


def _called(one: NewExpert) -> str:
    """What its expert.json calls it, else the name that it was dropped under."""
    return one.given_name or one.name


def _task(one: NewExpert) -> str:
    return str((one.about or {}).get("task") or "-")


def _first(withdrawal: Withdrawal | None) -> Sequence[NewExpert]:
    return withdrawal.experts[:MOST_EXPERTS] if withdrawal else ()


def _finalize(value: Any) -> str:
    """What `{{ }}` prints in the template: escaped, whatever it is."""
    return value if isinstance(value, Verbatim) else escaped(str(value))


_TEMPLATES = Environment(  # autoescape would know HTML only
    loader=PackageLoader("daemon"),
    finalize=_finalize,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
