"""`mainstem reload`: a running daemon reads its settings again."""

from daemon.cli.asking import meanwhile, tell
from daemon.cli.common import HomeArgument, HomeOption, JsonOption, find_home, one_home
from daemon.errors import BadHome
from registry.records import Deed


def command(at: HomeArgument = None, home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Have the daemon read its settings again, between two experts, and say what it took up, what needs a restart, or
    why those in force stay.
    """
    from daemon.interventions.deeds import Request, whoever
    from daemon.interventions.requests import ask

    where = find_home(None, one_home(at, home))

    def nobody() -> list[str]:
        raise BadHome(f"no daemon runs on {where.root}", "`mainstem run` reads the settings as it starts")

    lines = ask(where, Request(Deed.RELOAD, whoever()), nobody, meanwhile(as_json))
    tell(Deed.RELOAD, lines, False, as_json)
