"""`mainstem promote`: a version that is held, or any newer one, is live."""

from daemon.cli.asking import on_version
from registry.records import Deed

command = on_version(
    Deed.PROMOTE,
    "Make a version live that is held, or newer than the live one. The newest also ends what a rollback began.",
)
