"""`mainstem block`: an expert does not come back."""

from daemon.cli.asking import on_experts
from registry.records import Deed

command = on_experts(Deed.BLOCK, "Let an expert not come back when the same weights arrive again.")
