"""`mainstem unblock`: an expert may come back."""

from daemon.cli.asking import on_experts
from registry.records import Deed

command = on_experts(Deed.UNBLOCK, "Let an expert come back that was rejected, withdrawn or blocked.")
