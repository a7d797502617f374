"""`mainstem evaluate`: the scores of versions, and of experts by themselves."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from daemon.cli.asking import expert_named, version_named
from daemon.cli.common import HomeOption, JsonOption, open_reader, print_json, print_table, settings_of
from daemon.notation import called
from projector.text import shown
from registry.records import Deed, Expert, NewEvaluation, Status, Version

if TYPE_CHECKING:
    from daemon.reports.evaluate import Judged
    from registry.records import Evaluation


def command(
    versions: Annotated[
        list[str] | None,
        typer.Argument(metavar="[VERSION]...", help="main/12, or 12; the live one by default.", show_default=False),
    ] = None,
    head: Annotated[str | None, typer.Option(help="The head, where VERSION does not name it: main at first.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Every version of the head whose files are kept.")] = False,
    experts: Annotated[
        list[str] | None, typer.Option("--expert", metavar="ID", help="An expert by itself. May be repeated.")
    ] = None,
    every_expert: Annotated[bool, typer.Option("--experts", help="Every merged expert by itself.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also what was scored before by the same command.")] = False,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score versions, or experts by themselves, with the evaluator of the settings; also beside the daemon.

    Nothing goes live or is held by it. Of a version that the gate could not judge it also says which rules it breaks.
    """
    from daemon.interventions.deeds import Request, whoever
    from daemon.interventions.requests import insist
    from daemon.logs import configure
    from daemon.reports.evaluate import Evaluating

    where, reader = open_reader(None, home)

    def keep(new: NewEvaluation, of: Version | Expert) -> None:
        whose = (None, None, (of.id,)) if isinstance(of, Expert) else (of.head, of.number, ())
        named, number, ids = whose
        insist(where, Request(Deed.EVALUATE, whoever(), None, named, number, ids, evaluation=new), _tell)

    def rejudge(of: Version, verdict: Mapping[str, Any], held: str | None) -> None:
        insist(where, Request(Deed.EVALUATE, whoever(), None, of.head, of.number, verdict=verdict, held=held), _tell)

    found: dict[str, Evaluation] = {}
    judged: dict[str, Judged] = {}
    with reader:
        settings = settings_of(where)
        configure(settings.log)
        evaluating = Evaluating(where, reader, settings, keep, rejudge)
        wanted = [version_named(reader, words, head) for words in versions or []]
        if every:
            name = head or reader.heads()[0].name
            wanted += reader.versions(name, newest_first=False, include_collected=False)
        single = [expert_named(reader, word, Deed.EVALUATE) for word in experts or []]
        single += [expert for expert in reader.lineage() if every_expert and expert.status is Status.MERGED]
        if not wanted and not single:
            wanted = [version_named(reader, head or reader.heads()[0].name, None)]
        for version in wanted:
            name = called(version.head, version.number)
            typer.echo(f"{name} ...", err=True)
            found[name] = evaluating.version(version, again=again)
            if said := evaluating.judged(version, found[name], again=again):
                judged[name] = said
        for expert in single:
            typer.echo(f"expert {expert.id} ({shown(expert.name)}) ...", err=True)
            found[f"expert {expert.id}"] = evaluating.expert(expert, again=again)
    if as_json:
        verdicts = {name: one.verdict for name, one in judged.items()}
        print_json({name: {**asdict(one), "verdict": verdicts.get(name)} for name, one in found.items()})
        return
    tasks = sorted({task for one in found.values() for task in one.scores})
    rows = ((name, *(_cell(one, task) for task in tasks)) for name, one in found.items())
    print_table(("of", *map(shown, tasks)), rows)
    for one in judged.values():
        typer.echo(one.standing)


def _tell(text: str) -> None:
    typer.echo(text, err=True)


def _cell(evaluation: "Evaluation", task: str) -> float | None:
    score = evaluation.scores.get(task)
    return score.score if score else None
