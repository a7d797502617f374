"""`mainstem promote`: a version that is held, or any newer one, is live."""

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
    """Make a version live that is held, or newer than the live one. The newest also ends what a rollback began."""
    intervene(Deed.PROMOTE, home, reason, dry_run, version=version, head=head, as_json=as_json)
