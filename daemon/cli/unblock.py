"""`mainstem unblock`: an expert may come back."""

from daemon.cli.asking import DryRunOption, ExpertArgument, ReasonOption, intervene
from daemon.cli.common import HomeOption, JsonOption
from registry.records import Deed


def command(
    experts: ExpertArgument,
    reason: ReasonOption = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let an expert come back that was rejected, withdrawn or blocked."""
    intervene(Deed.UNBLOCK, home, reason, dry_run, experts=experts, as_json=as_json)
