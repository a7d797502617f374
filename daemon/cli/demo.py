"""`mainstem demo`: real data, real training, the real daemon."""

import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from daemon.cli.common import HomeOption, one_home
from daemon.errors import BadHome
from daemon.home.presets import DEFAULT_METHOD

if TYPE_CHECKING:
    from torch import Tensor

    from daemon.demo.live import Live

BAD = 1  # which of the tasks an expert with shuffled labels was meant for
BAD_AFTER = 4  # versions it arrives

console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


def command(
    at: Annotated[
        Path | None,
        typer.Argument(metavar="HOME", help="Where to make its home, else a temporary folder.", show_default=False),
    ] = None,
    home: HomeOption = None,
    port: Annotated[int, typer.Option(help="Port of the demo's daemon, 0 for a free one.")] = 0,
    stay: Annotated[bool, typer.Option("--stay", help="Leave the daemon running at the end, until Ctrl-C.")] = False,
) -> None:
    """Train a base and nine experts on handwritten digits, one of them on wrong labels, let the daemon merge them, and
    show what came out, what its gate kept out, and how to go back.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):  # the daemon ends with us, also where the terminal is closed
        signal.signal(number, lambda *_: sys.exit(1))
    home = one_home(at, home)
    if home is None:
        with tempfile.TemporaryDirectory(prefix="mainstem-demo-") as folder:
            _demo(Path(folder) / "home", port, stay)
            console.print("\nthe daemon and its home are gone; `mainstem demo --home FOLDER --stay` leaves both")
    elif home.exists() and any(home.iterdir()):
        raise BadHome(f"{home} is not empty", "choose another folder for the demo, or remove it")
    else:
        from daemon.config import Http

        _demo(home, port, stay)
        again = f"  {_mainstem()} run --home {quote(str(home))} &\n{_ways_in(f'http://127.0.0.1:{Http().port}')}"
        console.print(f"\nthe daemon has stopped; this starts it again:\n{again}", markup=False, soft_wrap=True)


def _demo(home: Path, port: int, stay: bool) -> None:
    from safetensors.torch import save_file

    from daemon.cli.report import command as write_report
    from daemon.demo import live as running
    from daemon.demo.digits import CENTRE, TASKS, accuracy, finetune, pretrain, save_held_out
    from daemon.home.founding import found
    from daemon.layout import Home
    from daemon.reports.report import charts
    from projector.methods import make

    charts.require()
    tasks = (CENTRE, *TASKS)
    table = Table("", *(task.name.replace("_", " ") for task in tasks), "merged tasks", title="held-out accuracy, %")

    def row(label: str, weights: "dict[str, Tensor]", merged: int) -> None:
        scores = [100 * accuracy(weights, task) for task in tasks]
        mean = f"{sum(scores[1 : merged + 1]) / merged:.1f}" if merged else ""
        cells = [f"[bold]{s:.1f}[/bold]" if 0 < i <= merged else f"{s:.1f}" for i, s in enumerate(scores)]
        table.add_row(label, *cells, mean)

    with console.status("training") as status:
        base = pretrain(status.update)
        experts = [finetune(base, task, status.update) for task in TASKS]
        bad = finetune(base, TASKS[BAD], status.update, shuffled=True)
    console.print(
        f"trained a base on digits in the centre of the field, {len(TASKS)} experts on other places, and one on"
        " shuffled labels"
    )
    row("base", base, 0)
    for task, expert in zip(TASKS, experts, strict=True):
        row(f"expert {task.name.replace('_', ' ')}", expert, 0)
    row("shuffled labels", bad, 0)
    table.add_section()

    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        weights, made = Path(folder) / "digits.safetensors", Home(home.resolve())
        save_file(base, weights)
        say = partial(_say, end=" ...\n")
        found(made, weights, [("main", make(DEFAULT_METHOD))], say, config=running.settings())
    save_held_out(home / running.DIGITS)
    with running.daemon(home, port) as live:
        console.print(f"the daemon is live: [bold]{live.url}/[/bold]   home: {home}")
        for number, (task, expert) in enumerate(zip(TASKS, experts, strict=True), start=1):
            if number == BAD_AFTER + 1:
                _show_rejected(live, bad, TASKS[BAD].name)
            live.drop(task.name, expert, task.name)
            live.wait_for(number)
            row(f"merged main/{number}", live.fetch(), number)
            console.print(f"dropped {task.name} into the inbox: main/{number} is live")
        _show_turns(live, len(TASKS))
        _say(f"$ {_mainstem()} report {quote(str(home / 'report.html'))} --home {quote(str(home))}")
        write_report(home / "report.html", home)
        console.print(table)
        _epilogue(live, stay)


def _show_rejected(live: "Live", weights: "dict[str, Tensor]", task: str) -> None:
    """What the gate says of an expert that was trained on wrong labels."""
    before, name = live.live(), f"{task}_shuffled"
    live.drop(name, weights, task)
    told = live.outcome(name)
    if told["status"] == "merged":
        live.wait_for(before + 1)
    _say(f"dropped {name} into the inbox: it is {told['status']}, main/{live.live()} is live")
    _say(f"    {told['detail']} (its norm is {told['norm']:.1f}, as any)")


def _show_turns(live: "Live", newest: int) -> None:
    """Back to the version before, as somebody would who found the newest bad, and forth again."""
    for verb, version, why in (
        ("rollback", newest - 1, "does it read the top left less well?"),
        ("promote", newest, "no"),
    ):
        words = (verb, f"main/{version}", "--reason", why)
        _say(f"$ {_mainstem()} {' '.join(map(quote, words))} --home {quote(str(live.inbox.parent))}")
        seconds = live.type(*words)
        _say(f"consumers get main/{live.live()}, {seconds:.1f} s after it was typed")


def _say(text: str, end: str = "\n") -> None:
    console.print(text, markup=False, soft_wrap=True, end=end)


def _epilogue(live: "Live", stay: bool) -> None:
    console.print(
        "The base reads one place, an expert one other; the merged model reads every place merged so far (bold)."
    )
    console.print(f"a scraped metric: {live.metric('mainstem_head_version')[0]}")
    if stay:
        more = f"the daemon runs on: drop more experts into {live.inbox}. Ctrl-C ends the demo\n{_ways_in(live.url)}"
        console.print(f"\n{more}", markup=False, soft_wrap=True)
        with suppress(KeyboardInterrupt):
            signal.pause()


def _ways_in(url: str) -> str:
    fetch = f"curl -fLO {url}/v1/heads/main/latest/files/model.safetensors"
    return f"  {url}/ is its page, and this fetches the weights:\n  {fetch}"


def _mainstem() -> str:
    """What to type for this program: its path, where it was called by that and a shell would not find it."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "mainstem" and not shutil.which("mainstem") else "mainstem"
