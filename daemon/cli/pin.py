"""`mainstem pin`: a version stays."""

from daemon.cli.asking import DryRunOption, HeadOption, ReasonOption, VersionArgument, intervene
from daemon.cli.common import HomeOption, JsonOption
from registry.records import Deed


def command(
    version: VersionArgument,
    head: HeadOption = None,
    reason: ReasonOption = None,
    dry_run: DryRunOption = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Keep a version, files and state, whatever retention says."""
    intervene(Deed.PIN, home, reason, dry_run, version=version, head=head, as_json=as_json)
