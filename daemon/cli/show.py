"""`mainstem show`: one expert or one version."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.common import HomeArgument, HomeOption, JsonOption, complain, in_words, open_reader, print_json
from daemon.errors import DaemonError, Reason
from daemon.layout import Home
from daemon.notation import called, find_version, read_name
from projector.text import shown
from registry.records import UNKNOWN_KIND, Evaluation, Score, plain_scores

if TYPE_CHECKING:
    from registry.reader import Reader
    from registry.records import Expert

MOST = 100  # experts that are shown where many have one name


def command(
    what: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="An expert: its id, sha256 or name. A version: HEAD/N, as main/12.", show_default=False
        ),
    ],
    at: HomeArgument = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one expert, or one version with its manifest."""
    if at is None and home is None and Home(Path(what)).exists():
        raise typer.BadParameter(f"{what} is a home: put the ID of an expert or a version before it", param_hint="ID")
    where, reader = open_reader(at, home)
    with reader:
        named = read_name(what, [head.name for head in reader.heads()])
        if named and not what.isdecimal():
            version = find_version(reader, what)
            path = where.manifest(version.head, version.number)
            manifest = json.loads(path.read_bytes()) if path.exists() else None
            head = reader.head(version.head)
            known = {**asdict(version), "live": head is not None and head.live == version.number}
            found = [{"called": called(version.head, version.number), **known, "manifest": manifest}]
        else:
            found = [_expert(reader, expert) for expert in reader.find_experts(what, MOST + 1)]
            if not found and shown(what) != what:  # as it lies on the disk; it is printed, and kept, in one line
                found = [_expert(reader, expert) for expert in reader.find_experts(shown(what), MOST + 1)]
        evaluations = reader.evaluations(record["evaluation"] for record in found)
    found = [_scored(record, evaluations.get(record["evaluation"])) for record in found]
    if not found:
        hint = "see `mainstem log`, which takes --name GLOB; versions are named HEAD/N, as main/12"
        raise DaemonError(Reason.UNKNOWN, f"no expert is called {what!r}", hint)
    if len(found) > MOST:
        found = found[:MOST]
        complain(f"more than {MOST} experts are called so: these are the newest of them", "`mainstem log` has them all")
    if as_json:
        print_json(found[0] if len(found) == 1 else found)
        return
    typer.echo("\n\n".join(_lines(_in_words(record)) for record in found))


def _expert(reader: "Reader", expert: "Expert") -> dict[str, Any]:
    """An expert, and where it was merged what the gate said of each head's version that folded it."""
    there = [reader.version(head.name, expert.version) for head in reader.heads()] if expert.version else []
    made = [version for version in there if version and version.expert_id == expert.id]
    return {**asdict(expert), "verdicts": {called(one.head, one.number): one.verdict for one in made}}


def _scored(record: Mapping[str, Any], evaluation: Evaluation | None) -> dict[str, Any]:
    """An expert or a version with its scores by task; null where it was not evaluated."""
    scores = plain_scores(evaluation.scores) if evaluation else None
    if "manifest" not in record:
        return {**record, "scores": scores}
    return {**{key: value for key, value in record.items() if key != "manifest"}, "scores": scores} | {
        "manifest": record["manifest"]
    }


def _in_words(record: Mapping[str, Any]) -> dict[str, Any]:
    """The same for people: each score in a line, and none a second time in the verdict."""
    verdict, scores = record["verdict"], record["scores"]
    plain = verdict and {key: value for key, value in verdict.items() if key != "scores" or not scores}
    told = {**record, "verdict": plain and _verdict(plain), "scores": scores and _each(scores)}
    if "verdicts" in record:
        told["verdicts"] = {name: one and _verdict(one) for name, one in record["verdicts"].items()}
    return told


def _verdict(verdict: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _each(value) if key == "scores" else value for key, value in verdict.items()}


def _each(scores: Mapping[str, Any]) -> dict[str, str]:
    return {task: in_words(Score(**score)) for task, score in scores.items()}


def _lines(record: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in record.items():
        if key == "kind" and value == UNKNOWN_KIND:
            continue
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}\n{_lines(value, indent + '  ')}")
        elif isinstance(value, list | tuple) and value:
            lines.append(f"{indent}{key}" + "".join(f"\n{indent}  {_one_line(item)}" for item in value))
        else:
            lines.append(f"{indent}{key:<16} {'-' if value in (None, (), []) else value}")
    return "\n".join(lines)


def _one_line(item: Any) -> str:
    return "  ".join(str(value) for value in item.values()) if isinstance(item, dict) else str(item)
