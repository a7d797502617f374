"""An event as others are told of it."""

from dataclasses import dataclass
from typing import Any, Protocol

from daemon.layout import ADAPTER_FOLDER, Home
from registry.records import Delivery

MOST_LETTERS = 500  # of what an attempt came to


@dataclass(frozen=True, slots=True)
class Answer:
    """What an attempt came to. again_seconds: when to try again, at the earliest, where the receiver says so."""

    delivered: bool
    text: str
    again_seconds: float | None = None


class Way(Protocol):
    """How an endpoint is told."""

    def deliver(self, delivery: Delivery) -> Answer:
        """One attempt; what goes wrong is its answer."""

    def abort(self) -> None:
        """Cuts short what is being tried, and all that is tried from here on. From any thread."""


def payload(home: Home, delivery: Delivery) -> dict[str, Any]:
    """The event, ready for JSON: the same at every attempt."""
    data: dict[str, Any] = {"home": str(home.root.absolute()), **delivery.data}
    head, version = data.get("head"), data.get("version")
    if head is not None and version is not None:
        folder = home.version(head, version).absolute()
        adapter = folder / ADAPTER_FOLDER
        data |= {"folder": str(folder), "adapter": str(adapter) if adapter.is_dir() else None}
        data["path"] = f"/v1/heads/{head}/versions/{version}"
    return {"type": str(delivery.event), "timestamp": delivery.at.isoformat(timespec="milliseconds"), "data": data}


def in_a_line(text: str) -> str:
    """What somebody else wrote, as it may stand in a message.

    >>> in_a_line(" one\\n\\x1b[1mtwo ")
    'one [1mtwo'
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
