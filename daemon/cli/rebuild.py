"""`mainstem rebuild`: the archive merged again."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from daemon.cli.common import HomeArgument, HomeOption, find_home, settings_of
from daemon.cli.init import Chosen, chosen, heads_chosen, heads_of
from daemon.cli.interrupting import ending_with
from daemon.errors import BadConfig
from daemon.home.presets import RELATIVE
from daemon.layout import Home
from daemon.notation import called
from projector.text import listed
from registry.records import Deed, NewIntervention

if TYPE_CHECKING:
    from daemon.config import Settings
    from daemon.rebuild.commands import Plan
    from daemon.rebuild.learning import Learning
    from daemon.rebuild.replay import Console

STEPS, RATE = 500, 1e-3  # the authors'; said here, too, because what learns brings torch
GOES_ON = "the same command goes on where it was"


def command(
    at: HomeArgument = None,
    home: HomeOption = None,
    target: Annotated[
        Path | None, typer.Option("--into", help="Make a new home there, and merge the archive into it.")
    ] = None,
    heads: Annotated[
        list[str] | None,
        typer.Option(
            "--head",
            help="With --into: a further head of the new home, NAME=METHOD. Without: add the head NAME to this home.",
            metavar="NAME[=METHOD]",
        ),
    ] = None,
    method: Annotated[str | None, typer.Option(help="The method of the head; with --into, that of `main`.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A parameter, KEY=VALUE; with --into HEAD.KEY=VALUE for another head.", metavar="KEY=VALUE"
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(help="Leave this merged expert out: its id, sha256 or name. May be repeated.", metavar="ID"),
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="With --without: merge the others again where one could subtract, too.")
    ] = False,
    reason: Annotated[
        str | None, typer.Option("--reason", help="With --without or --into: why; kept with who and when.")
    ] = None,
    adamerging: Annotated[
        str | None,
        typer.Option(
            help="With --into or --head: learn coefficients by this command, which runs the model on unlabelled data.",
            metavar="COMMAND",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="With --adamerging: steps.", min=1, max=10**6)] = STEPS,
    lr: Annotated[float, typer.Option(help="With --adamerging: Adam's step size.", min=1e-9, max=1.0)] = RATE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done, and how long it may take.")
    ] = False,
) -> None:
    """Merge the archive again: into a new home (--into), as a new head (--head), or --without some of its experts.

    Cut short, it goes on where it was when it is called again. With --head the daemon must be stopped; --without is
    done by the daemon where one runs, between two experts.
    """
    from daemon.interventions.deeds import whoever
    from daemon.logs import configure
    from daemon.rebuild import commands
    from daemon.rebuild.learning import METHOD, learning

    where, gone = find_home(at, home), without or []
    if replay and (target is not None or not gone):
        raise BadConfig("--replay is for --without", "everything else is replayed in any case")
    if adamerging is None and (steps, lr) != (STEPS, RATE):
        raise BadConfig("--steps and --lr are for --adamerging", "leave them out, or give --adamerging COMMAND")
    makes = target is not None or heads  # of what is taken out, a daemon may go on
    with ending_with(GOES_ON) if makes else nullcontext(), console() as to:
        if target is not None:
            new = Home(target.resolve())
            in_force = settings_of(new if new.config.exists() else where)
            how = learning(adamerging, in_force.evaluate, steps, lr) if adamerging is not None else None
            wanted = _heads(where, method or (METHOD if how else None), heads or [], settings or [])
            methods, relative = wanted or (None, ())
            deed = NewIntervention(Deed.BLOCK, whoever(), reason)
            plan = commands.into(
                where, new, in_force, methods, gone, to, relative=relative, dry=dry_run, deed=deed, how=how
            )
            done = f"made {new.root}: {_done(plan, how)}"
        elif heads:
            if gone or len(heads) > 1:
                raise BadConfig("--head adds one head, with every merged expert", "give --into for anything else")
            in_force = settings_of(where)
            configure(in_force.log)  # the gate's evaluator is heard there
            how = learning(adamerging, in_force.evaluate, steps, lr) if adamerging is not None else None
            name = heads[0].partition("=")[0]
            if how and _is_there(where, name):
                if method or settings or name != heads[0]:
                    hint = f"leave its method and --set out: `--head {name}` learns it again"
                    raise BadConfig(f"there is a head {name!r} already", hint)
                plan = commands.learn_again(where, in_force, name, to, how, dry=dry_run)
                already = "" if plan.number else ", and were already"
                done = f"{_called(name, plan)}: {_done(plan, how)}{already}"
            else:
                method = method or (METHOD if how and "=" not in heads[0] else None)
                plan = _add(where, in_force, heads[0], method, settings or [], to, how, dry_run)
                done = f"{_called(name, plan)}: {_done(plan, how)}"
        elif gone:
            if method or settings or adamerging is not None:
                raise BadConfig("--without keeps every head's method", "give --into for a home with other methods")
            take_out(where, gone, to, reason=reason, replay=replay, dry=dry_run)
            return
        else:
            raise BadConfig("there is nothing to rebuild", "give --into, --head or --without; see --help")
    typer.echo("\n".join([_planned(plan) if dry_run else done, *plan.notes]))


def _is_there(where: Home, head: str) -> bool:
    from registry.reader import Reader

    with Reader.open(where.registry) as reader:
        return reader.head(head) is not None


def _add(
    where: Home,
    in_force: "Settings",
    head: str,
    method: str | None,
    settings: Sequence[str],
    to: "Console",
    how: "Learning | None",
    dry: bool,
) -> "Plan":
    """A new head: NAME=METHOD, or NAME and the method."""
    from daemon.rebuild.commands import add_head

    if (method is None) is ("=" not in head):
        wrong = "missing" if method is None else "given twice"
        raise BadConfig(f"the method of the head {head!r} is {wrong}", "use --method, or NAME=METHOD")
    ((name, named),) = heads_of([head] if method is None else [f"{head}={method}"]).items()
    words = [word if word.startswith(f"{name}.") else f"{name}.{word}" for word in settings]
    methods, relative = chosen({name: (named, {})}, words)
    return add_head(where, in_force, name, methods[name], to, relative=name in relative, dry=dry, how=how)


def take_out(
    where: Home,
    words: Sequence[str],
    to: "Console",
    *,
    reason: str | None,
    replay: bool = False,
    after: int | None = None,
    dry: bool = False,
) -> None:
    """Takes these merged experts out of every head, by the daemon where one runs, and says how. after: they are all
    that came after this version; the daemon takes those that it merges meanwhile, too.
    """
    from daemon.interventions.deeds import Request, whoever
    from daemon.interventions.requests import ask
    from daemon.rebuild.commands import described, plan_withdrawal, withdraw
    from daemon.rebuild.replay import merged_experts
    from registry.reader import Reader

    with Reader.open(where.registry) as reader:
        gone = merged_experts(reader, words)
        if dry:
            typer.echo(_planned(plan_withdrawal(where, reader, gone, to, replay=replay)))
            typer.echo(f"to be taken out: {listed([f'{one.id} ({one.name})' for one in gone], len(gone))}")
            return
    experts = tuple(expert.id for expert in gone)
    request = Request(Deed.WITHDRAW, whoever(), reason, version=after, experts=experts, replay=replay)

    def alone() -> list[str]:
        deed = replace(request.intervention, version=None)
        return described(withdraw(where, settings_of(where), gone, to, deed, replay=replay))

    typer.echo("\n".join(ask(where, request, alone, to.say)))


def _heads(home: Home, method: str | None, heads: Sequence[str], settings: Sequence[str]) -> Chosen | None:
    """The heads of a new home, main as in this one where no method is named; None, which stands for those of this one,
    where nothing is said of them.
    """
    from registry.reader import Reader

    if method is not None:
        return heads_chosen(None, method, heads, settings)
    if not heads and not settings:
        return None
    with Reader.open(home.registry) as reader:
        (main,) = [head for head in reader.heads() if head.name == "main"]
    ours = {"main": (main.method, {**main.params, RELATIVE: main.relative_to})}
    return chosen(ours | {name: (named, {}) for name, named in heads_of(heads).items()}, settings)


def _called(head: str, plan: "Plan") -> str:
    return head if plan.number is None else called(head, plan.number)


def _done(plan: "Plan", how: "Learning | None") -> str:
    experts = f"{len(plan.reads)} experts are merged"
    return f"{experts}, with coefficients that were learned" if how else experts


def _planned(plan: "Plan") -> str:
    lines = [f"{head}: to be {how}" for head, how in plan.how.items()]
    took = f"; a merge took {plan.usual_seconds:.3g} s here lately" if plan.usual_seconds is not None else ""
    often = f", {plan.readings} readings in all" if plan.readings != len(plan.reads) else ""
    return "\n".join([*lines, f"{len(plan.reads)} experts to be read{often}{took}"])


@contextmanager
def console() -> Iterator["Console"]:
    """A progress bar for a terminal, otherwise a line for every expert; on standard error."""
    from daemon.rebuild.replay import Console

    class Lines(Console):
        def say(self, text: str) -> None:
            typer.echo(text, err=True)

    class Bar(Console):
        def say(self, text: str) -> None:
            bar.update(task, description=text, completed=0.0)

        def show(self, share: float) -> None:
            bar.update(task, completed=share)

    if not sys.stderr.isatty():
        yield Lines()
        return
    columns = (
        TextColumn("{task.description}", markup=False),  # an expert may be called [red]
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield Bar()
