"""`mainstem pause`: no expert is merged until `mainstem resume`."""

from daemon.cli.asking import ReasonOption, intervene
from daemon.cli.common import HomeArgument, HomeOption, JsonOption, one_home
from registry.records import Deed


def command(
    at: HomeArgument = None, reason: ReasonOption = None, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Take no expert until `mainstem resume`, also after a restart. The one in hand is finished; what arrives waits in
    the inbox, and what was published is served.
    """
    intervene(Deed.PAUSE, one_home(at, home), reason, False, as_json=as_json)
