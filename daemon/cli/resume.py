"""`mainstem resume`: merging goes on."""

from daemon.cli.asking import ReasonOption, intervene
from daemon.cli.common import HomeArgument, HomeOption, JsonOption, one_home
from registry.records import Deed


def command(
    at: HomeArgument = None, reason: ReasonOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Go on merging after `mainstem pause`, or call off a `mainstem drain`."""
    intervene(Deed.RESUME, one_home(at, home), reason, False, as_json=as_json)
