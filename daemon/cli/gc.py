"""`mainstem gc`: what retention no longer keeps goes now."""

from daemon.cli.asking import DryRunOption, meanwhile, tell
from daemon.cli.common import HomeArgument, HomeOption, JsonOption, open_reader, settings_of
from registry.records import Deed


def command(
    at: HomeArgument = None, dry_run: DryRunOption = False, home: HomeOption = None, as_json: JsonOption = False
) -> None:
    """Remove the versions and states that retention no longer keeps, which else the next arrival does. A daemon that
    runs does it, by its own settings, between two arrivals.
    """
    from daemon.interventions.collecting import planned, remove_alone
    from daemon.interventions.deeds import Request, whoever
    from daemon.interventions.requests import ask

    where, reader = open_reader(at, home)
    settings = settings_of(where).retention
    if dry_run:
        with reader:
            lines = planned(where, reader, settings)
    else:
        reader.close()
        lines = ask(where, Request(Deed.COLLECT, whoever()), lambda: remove_alone(where, settings), meanwhile(as_json))
    tell(Deed.COLLECT, lines, dry_run, as_json, "nothing is to be removed: retention keeps all that is there", "")
