"""What an evaluator's output says: a score for each task."""

import json
from collections.abc import Mapping
from dataclasses import fields
from math import isfinite
from typing import Any

from daemon.errors import NoScores
from projector.text import once_each, shown
from registry.records import Score, Scores

MOST_BYTES = 16 << 20
MOST_TASKS = 256
MOST_NAME = 100

FORM = (
    'print one JSON object, {"TASK": SCORE} or {"TASK": {"score": SCORE, "higher_is_better": true, "n": 1000,'
    ' "stderr": 0.01, "held_out": false}}, as the last line, and everything else to standard error'
)
OF_THE_HARNESS = ("configs", "versions", "n-shot")  # of which its results file has one at the least
_FIELDS = {field.name for field in fields(Score)}


def read_scores(output: bytes) -> Scores:
    """The scores in an evaluator's output: one JSON object, which is all of it or its last line.

    {task: number}, or {task: {"score", "higher_is_better", "n", "stderr", "held_out"}}, or the results file of
    lm-evaluation-harness. Raises NoScores.
    """
    content = _object(output)
    if isinstance(content.get("results"), dict) and any(key in content for key in OF_THE_HARNESS):
        scores = _of_the_harness(content)
    else:
        scores = {task: _score(task, value) for task, value in content.items()}
    if not scores:
        raise _bad("it has no task")
    if len(scores) > MOST_TASKS:
        raise _bad(f"it has {len(scores)} tasks, {MOST_TASKS} are the most")
    for task in scores:
        if not task.strip() or len(task) > MOST_NAME or not task.isprintable():
            raise _bad(f"a task is called `{shown(task)}`, which is no printable name of at most {MOST_NAME} letters")
    return scores


def _object(output: bytes) -> dict[str, Any]:
    """All of the output, or else its last line, as JSON."""
    if len(output) > MOST_BYTES:
        raise _bad(f"it is longer than {MOST_BYTES} bytes")
    whole = output.strip()
    if not whole:
        raise NoScores("the evaluator printed nothing to its standard output", FORM)
    for text in (whole, whole.splitlines()[-1]):
        try:
            content = json.loads(text, object_pairs_hook=once_each(lambda: _bad("a name is there twice")))
        except (ValueError, RecursionError):
            continue
        if isinstance(content, dict):
            return content
        break
    last = whole.splitlines()[-1].decode(errors="replace").strip()
    raise NoScores(f"what the evaluator printed is no JSON object: it ends with `{shown(last)}`", FORM)


def _score(task: str, value: Any) -> Score:
    if not isinstance(value, dict):
        return Score(_number(task, "score", value))
    if unknown := sorted(value.keys() - _FIELDS):
        known = ", ".join(sorted(_FIELDS))
        raise _bad(f"the task `{shown(task)}` has a field `{shown(unknown[0])}`; there are {known}")
    if "score" not in value:
        raise _bad(f"the task `{shown(task)}` has no `score`")
    n, stderr = value.get("n"), value.get("stderr")
    return Score(
        score=_number(task, "score", value["score"]),
        higher_is_better=_truth(task, "higher_is_better", value.get("higher_is_better", True)),
        n=None if n is None else _count(task, n),
        stderr=None if stderr is None else _error(task, stderr),
        held_out=_truth(task, "held_out", value.get("held_out", False)),
    )


def _number(task: str, field: str, value: Any) -> float:
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        number = None
    if number is None or not isfinite(number):
        raise _bad(f"`{field}` of the task `{shown(task)}` is {shown(repr(value))}: it is a finite number")
    return number


def _error(task: str, value: Any) -> float:
    number = _number(task, "stderr", value)
    if number < 0:
        raise _bad(f"`stderr` of the task `{shown(task)}` is negative")
    return number


def _count(task: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 53:
        raise _bad(f"`n` of the task `{shown(task)}` is {shown(repr(value))}: it is a whole number above 0")
    return value


def _truth(task: str, field: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _bad(f"`{field}` of the task `{shown(task)}` is {shown(repr(value))}: it is true or false")
    return value


def _bad(detail: str) -> NoScores:
    return NoScores(f"what the evaluator printed cannot be read: {detail}", FORM)


def _of_the_harness(content: Mapping[str, Any]) -> Scores:
    """The scores in a results file of lm-evaluation-harness.

    A task's score is the first metric that it has there, with its first filter. A group that has a score of its own is
    a task, in place of those in it, so that nothing counts twice; its metric is the one that comes first in its first
    task, because the harness writes a group's in no order.
    """
    results = {task: value for task, value in content["results"].items() if isinstance(value, dict)}
    groups = {
        name: [task for task in tasks if isinstance(task, str)]
        for name, tasks in _table(content, "group_subtasks").items()
        if isinstance(tasks, list) and tasks
    }
    inside = {task for group in groups if _metrics(results.get(group, {})) for task in _below(group, groups)}
    scored = {task: found for task, value in results.items() if task not in inside and (found := _metrics(value))}
    scores = {}
    for task, metrics in scored.items():
        order = [metric for name in _below(task, groups) for metric in _metrics(results.get(name, {}))]
        metric = next((metric for metric in order if metric in metrics), metrics[0])
        scores[task] = _harness_score(content, task, metric)
    return scores


def _below(group: str, groups: Mapping[str, list[str]]) -> list[str]:
    """The tasks in a group, and in the groups in it, in order."""
    found: dict[str, None] = {}
    to_see = [group]
    while to_see:
        inner = groups.get(to_see.pop(), [])
        to_see += [task for task in reversed(inner) if task not in found]
        found |= dict.fromkeys(inner)
    return list(found)


def _metrics(result: Mapping[str, Any]) -> list[str]:
    """What a task was measured by: "acc,none" is the metric acc behind the filter none."""
    return [
        key
        for key, value in result.items()
        if "," in key and not key.partition(",")[0].endswith("_stderr") and isinstance(value, int | float)
    ]


def _harness_score(content: Mapping[str, Any], task: str, metric: str) -> Score:
    result = content["results"][task]
    name, _, chosen = metric.partition(",")
    higher = _table(_table(content, "higher_is_better"), task).get(name)
    if not isinstance(higher, bool):
        raise NoScores(
            f"the results file does not say whether a higher {shown(name)} of {shown(task)} is better",
            "give it `higher_is_better` in the metric_list of the task's YAML, or print the scores yourself: " + FORM,
        )
    stderr = result.get(f"{name}_stderr,{chosen}")
    counted = _table(_table(content, "n-samples"), task).get("effective", result.get("sample_len"))
    return Score(
        score=_number(task, name, result[metric]),
        higher_is_better=higher,
        n=counted if isinstance(counted, int) and counted > 0 else None,
        stderr=_error(task, stderr) if isinstance(stderr, int | float) else None,  # "N/A" where there is none
    )


def _table(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}
