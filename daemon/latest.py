"""The names by which folder readers find the live version: the link `latest` and the plain file LATEST."""

from daemon import durable
from daemon.home import Home, number
from registry.records import Head


def point_latest(home: Home, head: Head) -> None:
    """Lets `latest` and LATEST name the head's live version; nothing is touched where they do already."""
    target = number(head.live)
    link, plain = home.latest(head.name), home.versions(head.name) / "LATEST"
    if not link.is_symlink() or link.readlink().name != target:
        durable.point(link, target)
    if not plain.is_file() or plain.read_text().strip() != target:
        durable.replace_file(plain, f"{target}\n".encode())
