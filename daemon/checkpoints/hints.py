"""The paths in hints: who words one knows not where things are, or where they will be once the expert is refused."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from daemon.checkpoints.unfinished import TEMPORARY
from daemon.checkpoints.weight_names import FORMATS
from daemon.errors import DaemonError
from daemon.layout import Home
from projector.errors import ProjectorError
from projector.text import BASE, EXPERT, FOLDER, NEW, OUT, shown

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", *FORMATS)
WORDS = "|".join((EXPERT, FOLDER, NEW, OUT, BASE))
IN_QUOTES = re.compile(f'"({WORDS})([^"]*)"')
ALONE = re.compile(WORDS)


def filled(hint: str, expert: Path, home: Home | None = None, base: str | None = None) -> str:
    """The hint with paths in it: in double quotes as in Python or JSON, else as in a shell.

    expert: where it will be when the hint is read. home: where it was dropped, or would be. base: what the expert was
    trained from, by default the home's base.
    """
    is_file = expert.suffix in SUFFIXES
    stem = expert.stem if is_file else expert.name
    again = f"{stem}-2"
    taken = home is None or expert.parent == home.inbox or TEMPORARY.fullmatch(stem)
    paths = {
        EXPERT: str(expert),
        FOLDER: "the folder that it came from" if is_file else str(expert),
        NEW: str(home.inbox / (again if taken else stem)) if home else again,
        OUT: again,
        BASE: base or (str(home.base) if home else "the base that it was trained from"),
    }
    paths = {word: _printable(path) for word, path in paths.items()}
    hint = IN_QUOTES.sub(lambda found: json.dumps(paths[found[1]] + found[2], ensure_ascii=False), hint)
    return ALONE.sub(lambda found: quote(paths[found[0]]), hint)


@contextmanager
def hinting(expert: Path, home: Home | None = None, base: str | None = None) -> Iterator[None]:
    """Fills in the hint of what is raised in the block of this expert; see `filled`."""
    try:
        yield
    except (DaemonError, ProjectorError) as error:
        error.hint = filled(error.hint, expert, home, base)
        raise


@contextmanager
def below(within: str | None) -> Iterator[None]:
    """Hints of what is raised in the block are about what lies there, below the path that was dropped."""
    try:
        yield
    except (DaemonError, ProjectorError) as error:
        for whole in (EXPERT, FOLDER) if within else ():
            error.hint = error.hint.replace(whole, f"{whole}/{quote(shown(within or ''))}")
        raise


def inner(path: str | None) -> str:
    """How a hint names what lies at this path in the expert's folder; the expert itself, where it is None."""
    return f"{EXPERT}/{quote(shown(path))}" if path else EXPERT


def in_a_shell(path: Path) -> str:
    """How a hint writes a path in a command."""
    return quote(_printable(str(path)))


def from_beside(text: str, home: Home) -> str:
    """A hint with paths in it, as it is right in the folder that the home is in; where that is, it says no more.

    >>> from_beside("`mainstem convert /srv/chat/quarantine/000003/x /srv/chat/inbox/x-2`", Home(Path("/srv/chat")))
    '`mainstem convert chat/quarantine/000003/x chat/inbox/x-2`'
    """
    root = _printable(str(home.root.absolute()))
    for written in (str, _in_single_quotes, _in_json):
        whole, name = written(root), written(Path(root).name)
        text = re.sub(rf"(?<![\w/.-]){re.escape(whole)}(?![\w-])", name.replace("\\", r"\\"), text) if name else text
    return text


def _in_single_quotes(path: str) -> str:
    return path.replace("'", "'\"'\"'")  # as shlex has it


def _in_json(path: str) -> str:
    return json.dumps(path, ensure_ascii=False)[1:-1]


def _printable(path: str) -> str:
    return path if path.isprintable() else shown(path)
