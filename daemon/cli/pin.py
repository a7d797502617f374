"""`mainstem pin`: a version stays."""

from daemon.cli.asking import on_version
from registry.records import Deed

command = on_version(Deed.PIN, "Keep a version, files and state, whatever retention says.")
