"""`mainstem unpin`: a version may go again."""

from daemon.cli.asking import on_version
from registry.records import Deed

command = on_version(Deed.UNPIN, "Let retention remove a version again.")
