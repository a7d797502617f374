"""What an evaluator prints, read; and everything that is no score."""

import json
from typing import Any

import pytest

from daemon.errors import NoScores, Reason
from daemon.evaluation.scores import MOST_BYTES, MOST_TASKS, read_scores
from registry.records import Score


def read(value: Any) -> dict[str, Score]:
    return dict(read_scores(json.dumps(value).encode()))


def test_numbers_and_objects_are_scores() -> None:
    said = {
        "sort": 0.5,
        "count": 3,
        "loss": {"score": 2.5, "higher_is_better": False, "n": 100, "stderr": 0.1, "held_out": True},
        "bare": {"score": 1, "n": None, "stderr": None},
    }
    assert read(said) == {
        "sort": Score(0.5),
        "count": Score(3.0),
        "loss": Score(2.5, higher_is_better=False, n=100, stderr=0.1, held_out=True),
        "bare": Score(1.0),
    }


@pytest.mark.parametrize(
    "output",
    [
        b'{"sort": 0.5}',
        b'\n  {"sort":\n 0.5}\n\n',
        b'loading weights\n100%|####| 3/3\r\n{"sort": 0.5}\n',
        b'{"old": 1}\n{"sort": 0.5}',
    ],
)
def test_the_object_is_all_of_the_output_or_its_last_line(output: bytes) -> None:
    assert read_scores(output) == {"sort": Score(0.5)}


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (b"", "printed nothing"),
        (b" \n", "printed nothing"),
        (b"done", "is no JSON object: it ends with `done`"),
        (b'{"sort": 0.5}\nTraceback: no', "it ends with `Traceback: no`"),
        (b"[0.5]", "is no JSON object"),
        (b"\xff\xfe{", "is no JSON object"),
        (b"[" * 100_000, "is no JSON object"),
        (b"{}", "it has no task"),
        (b'{"sort": 0.5, "sort": 0.6}', "a name is there twice"),
        (b'{"sort": NaN}', "`score` of the task `sort` is nan: it is a finite number"),
        (b'{"sort": -Infinity}', "is -inf"),
        (b'{"sort": 1e999}', "is inf"),
        (b'{"sort": 1' + b"0" * 400 + b"}", "it is a finite number"),
        (b'{"sort": true}', "is True: it is a finite number"),
        (b'{"sort": "0.5"}', "it is a finite number"),
        (b'{"sort": null}', "it is a finite number"),
        (b'{"sort": [0.5]}', "it is a finite number"),
        (b'{"sort": {}}', "the task `sort` has no `score`"),
        (b'{"sort": {"score": NaN}}', "is nan"),
        (
            b'{"sort": {"score": 1, "std": 1}}',
            "has a field `std`; there are held_out, higher_is_better, n, score, stderr",
        ),
        (
            b'{"sort": {"score": 1, "higher_is_better": 1}}',
            "`higher_is_better` of the task `sort` is 1: it is true or false",
        ),
        (b'{"sort": {"score": 1, "held_out": null}}', "`held_out` of the task `sort` is None"),
        (b'{"sort": {"score": 1, "n": 0}}', "`n` of the task `sort` is 0: it is a whole number above 0"),
        (b'{"sort": {"score": 1, "n": 1.5}}', "`n` of the task `sort`"),
        (b'{"sort": {"score": 1, "n": true}}', "`n` of the task `sort`"),
        (b'{"sort": {"score": 1, "stderr": -1}}', "`stderr` of the task `sort` is negative"),
        (b'{"sort": {"score": 1, "stderr": Infinity}}', "`stderr` of the task `sort` is inf"),
        (b'{"": 1}', "no printable name"),
        (b'{" ": 1}', "no printable name"),
        (b'{"a\\u001b[31m": 1}', "no printable name"),
        (b'{"' + b"a" * 101 + b'": 1}', "no printable name of at most 100 letters"),
        (json.dumps(dict.fromkeys(map(str, range(MOST_TASKS + 1)), 1)).encode(), f"it has {MOST_TASKS + 1} tasks"),
        (b" " * MOST_BYTES + b'{"sort": 1}', "it is longer than"),
    ],
    ids=range(33),
)
def test_everything_else_is_no_score(output: bytes, said: str) -> None:
    with pytest.raises(NoScores) as no:
        read_scores(output)
    assert said in str(no.value) and no.value.reason is Reason.EVALUATION
    assert str(no.value).isprintable() and len(str(no.value)) < 400
    assert 'print one JSON object, {"TASK": SCORE}' in no.value.hint


def harness(**more: Any) -> dict[str, Any]:
    """A results file of lm-evaluation-harness, shortened: a plain task, a group with a score of its own that holds two
    tasks and a group, a group without one, and a task without a standard error.
    """
    return {
        "results": {
            "arc_easy": {
                "alias": "arc_easy",
                "acc,none": 0.41,
                "acc_stderr,none": 0.012,
                "acc_norm,none": 0.38,
                "acc_norm_stderr,none": 0.011,
            },
            "mmlu": {"acc_norm,none": 0.9, "acc,none": 0.3, "acc_stderr,none": 0.004, "alias": "mmlu"},
            "mmlu_stem": {"acc,none": 0.28, "acc_stderr,none": 0.008, "alias": " - stem"},
            "mmlu_algebra": {"alias": "  - algebra", "acc,none": 0.25, "acc_stderr,none": 0.04, "acc_norm,none": 0.2},
            "mmlu_law": {"alias": "  - law", "acc,none": 0.31, "acc_stderr,none": 0.01},
            "translation": {" ": " ", "alias": "translation"},
            "wmt": {"alias": " - wmt", "bleu,none": 22.5, "bleu_stderr,none": "N/A", "ter,none": 70.0},
            "wikitext": {
                "alias": "wikitext",
                "word_perplexity,none": 31.5,
                "word_perplexity_stderr,none": "N/A",
                "bits_per_byte,none": 0.9,
            },
            "gsm8k": {
                "alias": "gsm8k",
                "exact_match,strict-match": 0.1,
                "exact_match_stderr,strict-match": 0.02,
                "exact_match,flexible-extract": 0.15,
                "exact_match_stderr,flexible-extract": 0.03,
            },
        },
        "groups": {"mmlu": {"acc,none": 0.3, "acc_stderr,none": 0.004, "alias": "mmlu"}},
        "group_subtasks": {
            "mmlu": ["mmlu_stem", "mmlu_law"],
            "mmlu_stem": ["mmlu_algebra"],
            "translation": ["wmt"],
            "arc_easy": [],
        },
        "configs": {},
        "versions": {"arc_easy": 1.0},
        "n-shot": {"arc_easy": 0},
        "higher_is_better": {
            "arc_easy": {"acc": True, "acc_norm": True},
            "mmlu": {"acc": True, "acc_norm": True},
            "wmt": {"bleu": True, "ter": False},
            "wikitext": {"word_perplexity": False, "bits_per_byte": False},
            "gsm8k": {"exact_match": True},
        },
        "n-samples": {"arc_easy": {"original": 2376, "effective": 100}, "wikitext": {"original": 62, "effective": 62}},
        "config": {"model": "hf", "model_args": "pretrained=x"},
        **more,
    }


def test_the_results_file_of_the_harness_is_read_as_it_is() -> None:
    """The first metric with its first filter; a group's score in place of those of its tasks."""
    assert read(harness()) == {
        "arc_easy": Score(0.41, n=100, stderr=0.012),
        "mmlu": Score(0.3, stderr=0.004),
        "wmt": Score(22.5),
        "wikitext": Score(31.5, higher_is_better=False, n=62),
        "gsm8k": Score(0.1, stderr=0.02),
    }


def test_a_group_is_measured_by_what_its_first_task_is() -> None:
    """The harness writes a group's metrics in no order, another one each time."""
    one = harness()
    other = harness()
    other["results"]["mmlu"] = dict(reversed(other["results"]["mmlu"].items()))
    assert read(one)["mmlu"] == read(other)["mmlu"] == Score(0.3, stderr=0.004)


def test_groups_that_hold_each_other_end() -> None:
    said = harness(group_subtasks={"mmlu": ["mmlu_stem"], "mmlu_stem": ["mmlu"]})
    with pytest.raises(NoScores):
        read({**said, "results": {name: said["results"][name] for name in ("mmlu", "mmlu_stem")}})


@pytest.mark.parametrize("known", [{}, {"arc_easy": {"acc": None}}, {"arc_easy": True}, None])
def test_a_metric_of_unknown_direction_is_not_guessed_at(known: Any) -> None:
    with pytest.raises(NoScores, match="whether a higher acc of arc_easy is better") as no:
        read(harness(higher_is_better=known))
    assert "metric_list" in no.value.hint


def test_what_is_not_finite_in_a_results_file_is_no_score() -> None:
    said = harness()
    said["results"]["arc_easy"]["acc,none"] = float("nan")
    with pytest.raises(NoScores, match="`acc` of the task `arc_easy` is nan"):
        read(said)


def test_a_task_may_be_called_results() -> None:
    assert read({"results": 0.5}) == {"results": Score(0.5)}
    assert read({"results": {"score": 0.5}}) == {"results": Score(0.5)}
