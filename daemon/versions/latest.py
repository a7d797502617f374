"""The names by which folder readers find the live version: the link `latest` and the plain file LATEST.

Each changes at once, the link first: for a moment LATEST names the version before, which retention leaves alone then.
A crash between the two leaves just that, and recovery calls this again.
"""

from pathlib import Path
from threading import Lock

from daemon.disk import durable
from daemon.disk.failpoints import hit
from daemon.errors import BadHome
from daemon.layout import Home, number
from registry.reader import Reader
from registry.records import Head

PLAIN = "LATEST"


_POINTING = Lock()


def follow_live(home: Home, reader: Reader) -> None:
    """Lets `latest` and LATEST of every head name its live version. A rollback may come from another thread than a new
    version: whoever points last has also looked last.
    """
    with _POINTING:
        for head in reader.heads():
            point_latest(home, head)


def point_latest(home: Home, head: Head) -> None:
    """Lets `latest` and LATEST name the head's live version; nothing is touched where they do already.

    LATEST holds the name of the version's folder and a newline. Raises BadHome where a folder is in the way.
    """
    link, plain = home.latest(head.name), home.versions(head.name) / PLAIN
    for path in (link, plain):
        if path.is_dir() and not path.is_symlink():  # a copy of the home that followed links has one
            raise BadHome(f"{path} is a folder", "move it away; it is made again as it should be")
    if names_by_link(link) != number(head.live):
        durable.point(link, number(head.live))
        hit("latest.half")
    if names_by_file(plain) != number(head.live):
        durable.replace_file(plain, f"{number(head.live)}\n".encode())


def names_by_link(link: Path) -> str | None:
    """The folder that `latest` names; None where it is no link."""
    return str(link.readlink()) if link.is_symlink() else None


def names_by_file(plain: Path) -> str | None:
    """The folder that LATEST names; None where it is no file of ours."""
    text = plain.read_bytes()[:64] if plain.is_file() and not plain.is_symlink() else b""
    return text[:-1].decode("ascii", "replace") if text.endswith(b"\n") else None
