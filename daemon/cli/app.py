"""Puts the verbs together and turns every known error into one message, one hint and an exit status.

All verbs are imported to run any, so what takes long to import (torch, the HTTP server, the settings, SQLAlchemy) is
imported where a verb needs it: `tests/daemon/cli/test_command_imports.py` holds this.

Exit status: 0 done, 1 refused or found something wrong, 2 wrong use.
"""

import sys

import typer

from daemon.cli import (
    block,
    compare,
    config,
    convert,
    demo,
    doctor,
    drain,
    evaluate,
    export,
    gc,
    health,
    init,
    inspect,
    log,
    methods,
    pause,
    pin,
    promote,
    prune,
    pull,
    push,
    quarantine,
    rebuild,
    reload,
    report,
    resume,
    rollback,
    run,
    serve,
    show,
    status,
    study,
    unblock,
    unpin,
    verify,
    webhooks,
    zipit,
)
from daemon.cli.common import KNOWN, SAFE, complain
from daemon.cli.interrupting import interruptible

VERBS = (
    *(init, run, serve, status, health, log, show, report, compare, inspect, verify, methods, convert, pull, push),
    *(rebuild, demo, evaluate, rollback, promote, pin, unpin, gc, block, unblock, study, pause, resume, drain, doctor),
    *(prune, reload, zipit, export),
)

app = typer.Typer(
    name="mainstem",
    help="Keeps ONE merged model up to date while fine-tuned experts keep arriving.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in VERBS:
    app.command(command.__name__.rpartition(".")[2])(command.command)
app.add_typer(config.app, name="config")
app.add_typer(quarantine.app, name="quarantine")
app.add_typer(webhooks.app, name="webhooks")


@app.callback(invoke_without_command=True)
def _version(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from daemon.release import software_version

        typer.echo(f"mainstem {software_version()}")
        raise typer.Exit


def main() -> None:
    """Runs the command line."""
    try:
        with interruptible():
            app()
    except KNOWN as error:
        complain(str(error), error.hint)
        sys.exit(1)
    except OSError as error:
        complain(str(error), SAFE)
        sys.exit(1)
