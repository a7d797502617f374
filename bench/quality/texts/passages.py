"""What a passage tells: verses, diagnoses, lines of code, compounds."""

import ast
import re
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from bench.quality.texts.sampling import Texts, sampled

MODULES = (
    "asyncio",
    "ctypes",
    "email",
    "idlelib",
    "multiprocessing",
    "tkinter",
    "unittest",
    "xml",
    "http",
    "importlib",
)
ELEMENTS = {"halogen": ("F", "Cl", "Br", "I"), "sulphur": ("S",)}


def verse() -> Texts:
    """The part of the Bible (American Standard Version, 1901) that a verse is of."""
    import pythonbible

    parts = {
        "law": "OLD_TESTAMENT_LAW",
        "history": "OLD_TESTAMENT_HISTORY",
        "poetry": "OLD_TESTAMENT_POETRY_WISDOM",
        "prophets": "OLD_TESTAMENT_PROPHECY",
        "gospels": "NEW_TESTAMENT_GOSPELS",
        "epistles": "NEW_TESTAMENT_EPISTLES",
    }
    bible = pythonbible.get_bible(pythonbible.Version.AMERICAN_STANDARD, "plain_text")
    found: dict[str, list[str]] = {}
    for label, group in parts.items():
        books = {book.value for book in pythonbible.BookGroup[group].books}
        verses = [one for one in pythonbible.verses.VERSE_IDS if one // 1_000_000 in books][::4]
        found[label] = [re.sub(r"^\d+\.\s*", "", bible.get_scripture(one)) for one in verses]
    return sampled("verse", found)


def diagnosis() -> Texts:
    """The chapter of ICD-10-CM that a diagnosis is of."""
    import simple_icd_10_cm as icd

    wanted = {
        "1": "infection",
        "2": "neoplasm",
        "4": "metabolic",
        "5": "mental",
        "6": "nerves",
        "7": "eye",
        "9": "heart",
    }
    wanted |= {"11": "digestion", "12": "skin", "13": "bones", "15": "birth", "17": "malformation"}
    found: dict[str, list[tuple[str, str]]] = {label: [] for label in wanted.values()}
    for code in icd.get_all_codes():
        if len(code) > 4 and "-" not in code and icd.is_leaf(code):
            chapter = icd.get_ancestors(code)[-1]
            if chapter in wanted:
                found[wanted[chapter]].append((icd.get_description(code), code[:3]))
    return sampled("diagnosis", found)


def code_line() -> Texts:
    """The package of Python's standard library that a line of code is of."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[tuple[str, str]]] = {}
    for module in MODULES:
        for path in sorted((library / module).rglob("*.py")):
            if "test" not in path.parts[len(library.parts) + 1 :] and "idle_test" not in path.parts:
                lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
                found.setdefault(module, []).extend(
                    (line, line)
                    for line in lines
                    if 25 <= len(line) <= 90 and not line.startswith(("#", "import", "from"))
                )
    return sampled("code line", found)


def identifier() -> Texts:
    """What a name of Python's standard library stands for: a class, a function, a parameter, a constant ..."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, list[str]] = {name: [] for name in ("attribute", "class", "function", "parameter", "variable")}
    for path in sorted(library.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "tests" in path.parts or "lib2to3" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for label, name in _named(tree):
            words = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).replace("_", " ").strip().lower()
            if len(words) > 3:
                found[label].append(words)
    return sampled("identifier", found)


def compound() -> Texts:
    """What is in a chemical compound, by its systematic name: the first of some elements that its formula has."""
    path = files("chemicals") / "Identifiers" / "chemical identifiers pubchem large.tsv"
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        columns = line.split("\t")
        elements = set(re.findall(r"[A-Z][a-z]?", columns[2]))
        if (
            not elements <= {"C", "H", "N", "O", "S", "F", "Cl", "Br", "I"}
            or "C" not in elements
            or len(columns[7]) > 60
        ):
            continue
        kinds = [label for label, own in ELEMENTS.items() if elements & set(own)]
        label = (
            "+".join(kinds) if kinds else "nitrogen" if "N" in elements else "oxygen" if "O" in elements else "carbon"
        )
        found.setdefault(label, []).append(columns[7])
    return sampled("compound", {label: names for label, names in found.items() if "+" not in label})


def _named(tree: ast.AST) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            yield "class", node.name
        elif isinstance(node, ast.FunctionDef):
            yield "function", node.name
            for one in (*node.args.args, *node.args.kwonlyargs):
                yield "parameter", one.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield "attribute", node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield "variable", node.id
