"""`mainstem export`: a version of a smile head as a model whose layers choose among its experts."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.asking import HeadOption, VersionArgument, version_named
from daemon.cli.common import HomeOption, JsonOption, open_reader, print_json, settings_of
from daemon.cli.interrupting import ANEW, ending_with
from projector.text import listed, size


def command(
    version: VersionArgument,
    out: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    head: HeadOption = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a version of a head of smile as a folder for transformers, whose layers choose among the experts.

    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True) loads it. Nothing of the home is changed.
    """
    with ending_with(ANEW, out):
        from daemon.versions.routed import export

        where, reader = open_reader(None, home)
        with reader:
            done = export(where, reader, version_named(reader, version, head), out, settings_of(where).publish)
    if as_json:
        print_json(asdict(done))
        return
    earlier = f", and {done.evicted} earlier beneath" if done.evicted else ""
    typer.echo(f"{done.version} as {done.out}: {done.layers} layers choose among {listed(done.experts)}{earlier}")
    typer.echo(f"{size(done.size_bytes)}, {size(done.experts_bytes)} of it the experts' own")
