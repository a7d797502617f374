"""`mainstem convert`: a pickled checkpoint as safetensors, another tool's adapter as one of PEFT."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from daemon.cli.common import JsonOption, print_json
from daemon.cli.interrupting import ANEW, ending_with
from projector.text import size

if TYPE_CHECKING:
    from daemon.convert.converting import Converted, Report

MOST_LINES = 20


def command(
    file: Annotated[
        Path,
        typer.Argument(
            help="A pickled checkpoint, a folder with pytorch_model.bin or its shards, or another tool's LoRA adapter.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(help="What to make: a .safetensors file, or else a folder.", show_default=False)
    ],
    strip_prefix: Annotated[
        str, typer.Option(metavar="PREFIX", help="Take this off the tensors' names, for example module. or model.")
    ] = "",
    key: Annotated[
        str | None, typer.Option(help="The entry that holds the weights, such as ema, or generator/params.")
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for reading one file: 20GB; by default twice its size and 512 MiB."),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.001, help="Time for one file; by default 300 s and 50 s per GB."),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="Of an adapter of sd-scripts: a checkpoint with the base's names."),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Of an adapter that does not say it: the alpha that it was trained with.")
    ] = None,
    only: Annotated[
        str, typer.Option(metavar="PREFIX", help="Of an adapter for several models: the one, for example unet.")
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """Turn a pickled checkpoint (.bin, .pt, .pth, .ckpt) into safetensors without running what is in it.

    A process of its own, with limits on memory, time and files, reads it. A LoRA adapter of mlx-lm, torchtune,
    sd-scripts or diffusers becomes one of PEFT.
    """
    from daemon.convert.adapters import How, convert_adapter, weights_of
    from daemon.convert.confining import Options
    from daemon.convert.converting import convert

    options = Options(_bytes(memory) if memory else None, timeout, key, strip_prefix)
    with ending_with(ANEW, out):
        if weights_of(file):
            converted = convert_adapter(file, out, How(base, alpha, only))
        else:
            with _bar() as report:
                converted = convert(file, out, options, report)
    if as_json:
        print_json(converted)
    else:
        typer.echo("\n".join(_told(converted)))


def _bytes(text: str) -> int:
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        number = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        number = 0
    if number <= 0:
        raise typer.BadParameter("give a size, such as 800MB or 20GB", param_hint="--memory")
    return number


def _told(converted: "Converted") -> Iterator[str]:
    """The report, a line for each thing that was done or left out."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in sorted(converted.dtypes.items()))
    yield f"{converted.tensors} tensors, {size(converted.size_bytes)} ({dtypes}) in {converted.out}"
    if converted.inside:
        yield f"found under {converted.inside}"
    if converted.stripped:
        yield f"{converted.stripped} names are shorter by the prefix"
    tied = [" = ".join(group["names"]) for group in converted.shared if group["identical"]]
    yield from _some("tied", tied)
    views = sum(len(group["names"]) for group in converted.shared if not group["identical"])
    if views:
        yield f"{views} tensors were views of shared memory, and are each written whole"
    yield from _some("left out", [f"{entry['name']}: {entry['what']}" for entry in converted.left_out])
    if converted.copied:
        yield f"copied: {', '.join(converted.copied)}"
    yield f"sha256 {converted.sha256}, {converted.seconds:.1f} s"


def _some(what: str, lines: list[str]) -> Iterator[str]:
    yield from (f"{what}: {line}" for line in lines[:MOST_LINES])
    if len(lines) > MOST_LINES:
        yield f"{what}: {len(lines) - MOST_LINES} more, which --json lists"


@contextmanager
def _bar() -> Iterator["Report"]:
    """A bar for each file, on a terminal; it only pulses while the file is being loaded."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def report(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=None)
            progress.update(tasks[name], completed=done, total=total or None)

        yield report
