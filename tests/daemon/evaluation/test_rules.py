"""What rules make of scores: every case worked out by hand."""

import json
import math

import pytest

from daemon.errors import NoScores, Reason
from daemon.evaluation.figures import accumulation
from daemon.evaluation.rules import Question, Verdict, judge, needs
from daemon.requirements import parse
from registry.records import Score, Scores


def accuracies(**scores: float) -> Scores:
    return {task: Score(score) for task, score in scores.items()}


LIVE = accuracies(sort=0.80, parity=0.70, maze=0.60)  # mean 0.70
GOOD = accuracies(sort=0.79, parity=0.75, maze=0.62)  # mean 0.72
BAD = accuracies(sort=0.70, parity=0.80, maze=0.57)  # mean 0.69


def verdict(rule: str, candidate: Scores, **others: Scores | str | None) -> Verdict:
    return judge([parse(rule)], Question(candidate, **others))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rule", "candidate", "outcome"),
    [
        ("each >= live", GOOD, "held"),  # sort fell by 0.01
        ("each >= live - 0.01", GOOD, "live"),  # as much as is allowed, whatever rounding says
        ("each >= live - 0.009", GOOD, "held"),
        ("each >= live - 0.1 else reject", BAD, "live"),
        ("each >= live - 0.05 else reject", BAD, "rejected"),
        ("mean >= live", GOOD, "live"),
        ("mean >= live + 0.02", GOOD, "live"),
        ("mean >= live + 0.021", GOOD, "held"),
        ("mean >= live", BAD, "held"),
        ("mean >= live - 0.01", BAD, "live"),
        ("mean >= 0.72", GOOD, "live"),
        ("mean >= 0.7201", GOOD, "held"),
        ("each >= 0.62", GOOD, "live"),
        ("each >= 0.63", GOOD, "held"),
        ("each >= 0.7 - 0.1", GOOD, "live"),
        ('"maze" >= 0.7 else reject', GOOD, "rejected"),
        ('"sort" >= 0.7', BAD, "live"),
        ('"parity" >= live + 0.05', GOOD, "live"),
        ("own >= live + 0.02 else reject", GOOD, "live"),
        ("own >= live + 0.03 else reject", GOOD, "rejected"),
    ],
)
def test_rules_by_hand(rule: str, candidate: Scores, outcome: str) -> None:
    given = verdict(rule, candidate, live=LIVE, own="maze")
    assert given.outcome == outcome
    assert [one.rule for one in given.broken] == ([rule] if outcome != "live" else []) and not given.notes


def test_a_broken_rule_says_by_which_scores() -> None:
    each, mean, named = (
        verdict(rule, BAD, live=LIVE).broken[0].why
        for rule in ("each >= live - 0.02", "mean >= live", '"maze" >= 0.6 + 0.1')
    )
    assert each == (
        "`sort` 0.7 against 0.8: 0.1 worse than the live version, asked is at most 0.02 worse; "
        "`maze` 0.57 against 0.6: 0.03 worse than the live version, asked is at most 0.02 worse"
    )
    assert mean == "the mean of 3 tasks 0.69 against 0.7: 0.01 worse than the live version, asked is no worse"
    assert named == "`maze` 0.57 against 0.6: 0.03 worse than 0.6, asked is at least 0.1 better"


def test_where_lower_is_better_all_is_turned_round() -> None:
    loss = {"loss": Score(2.0, higher_is_better=False)}
    better, worse = ({"loss": Score(value, higher_is_better=False)} for value in (1.9, 2.1))
    assert verdict("each >= live", better, live=loss).outcome == "live"
    assert verdict("each >= live + 0.1", better, live=loss).outcome == "live"
    assert verdict("each >= live + 0.11", better, live=loss).outcome == "held"
    assert verdict("each >= live - 0.1", worse, live=loss).outcome == "live"
    assert (
        verdict("each >= live - 0.05", worse, live=loss)
        .broken[0]
        .why.startswith("`loss` 2.1 against 2 (lower is better): 0.1 worse than the live version")
    )
    assert verdict("each >= 2", better).outcome == "live"  # at most 2, that is
    assert verdict("mean >= 2", worse).outcome == "held"


def test_a_mean_of_both_kinds_is_of_what_each_task_gained() -> None:
    """0.1 more of one and 0.3 less loss of the other: 0.2 better on average. Against a number only accuracies count."""
    live = {"sort": Score(0.7), "loss": Score(2.0, higher_is_better=False)}
    candidate = {"sort": Score(0.8), "loss": Score(1.7, higher_is_better=False)}
    assert verdict("mean >= live + 0.2", candidate, live=live).outcome == "live"
    assert verdict("mean >= live + 0.21", candidate, live=live).broken[0].why == (
        "the mean of 2 tasks: 0.2 better than the live version, asked is at least 0.21 better"
    )
    assert verdict("mean >= 0.8", candidate).outcome == "live"
    assert verdict("mean >= 0.81", candidate).broken[0].why.startswith("the mean of 1 task 0.8 against 0.81")


def test_standard_errors_are_of_the_difference() -> None:
    """3 and 4 points: 5 of the difference. Of a mean over two such tasks: sqrt(25 + 25) / 2 = 3.5355 points."""
    live = {task: Score(0.8, stderr=0.03) for task in ("sort", "maze")}
    candidate = {task: Score(0.7, stderr=0.04) for task in ("sort", "maze")}
    assert verdict("each >= live - 2 se", candidate, live=live).outcome == "live"
    assert verdict("each >= live - 1.9 se", candidate, live=live).outcome == "held"
    assert verdict("mean >= live - 2.83 se", candidate, live=live).outcome == "live"
    assert verdict("mean >= live - 2.82 se", candidate, live=live).broken[0].why == (
        "the mean of 2 tasks 0.7 against 0.8: 0.1 worse than the live version,"
        " asked is at most 2.82 standard errors (0.0997) worse"
    )
    assert verdict("each >= 0.78 - 2 se", candidate).outcome == "live"  # 2 * 0.04
    assert verdict("each >= 0.79 - 2 se", candidate).outcome == "held"


def test_without_a_standard_error_a_rule_in_them_is_the_evaluators_fault() -> None:
    live = {"sort": Score(0.8, stderr=0.03)}
    with pytest.raises(
        NoScores, match=r"sort came without a standard error, which the rule `each >= live - 2 se`"
    ) as no:
        verdict("each >= live - 2 se", {"sort": Score(0.8)}, live=live)
    assert no.value.reason is Reason.EVALUATION and "stderr" in no.value.hint
    assert verdict("each >= live - 0.02", {"sort": Score(0.8)}, live=live).outcome == "live"


def test_held_out_tasks_are_tasks_but_not_of_the_mean() -> None:
    """The mean is the one that `mainstem log --versions` shows, whatever it is held against."""
    live = {"sort": Score(0.8), "unseen": Score(0.5, held_out=True)}
    candidate = {"sort": Score(0.82), "unseen": Score(0.4, held_out=True)}
    assert verdict("each >= live - 0.02", candidate, live=live).outcome == "held"
    assert verdict("mean >= live + 0.02", candidate, live=live).outcome == "live"
    assert verdict("mean >= live + 0.021", candidate, live=live).broken[0].why.startswith("the mean of 1 task 0.82 ag")
    shown = accumulation(candidate)
    assert shown and verdict(f"mean >= {shown}", candidate).outcome == "live"
    assert verdict(f"mean >= {shown + 0.001}", candidate).outcome == "held"
    unseen = {"unseen": candidate["unseen"]}
    assert verdict("mean >= live", unseen, live={"unseen": live["unseen"]}).notes == (
        "`mean >= live` does not apply: what it compares is held out, and in no mean",
    )
    assert verdict('"unseen" >= 0.4', candidate).outcome == "live"


def test_the_worst_of_all_broken_rules_counts() -> None:
    rules = [parse(text) for text in ("each >= live", "mean >= 0.71 else reject", '"sort" >= 0.7', "mean >= live")]
    given = judge(rules, Question(BAD, live=LIVE))
    assert given.outcome == "rejected"
    assert [(one.rule, one.outcome) for one in given.broken] == [
        ("each >= live", "held"),
        ("mean >= 0.71 else reject", "rejected"),
        ("mean >= live", "held"),
    ]
    assert judge(rules[::2], Question(BAD, live=LIVE)).outcome == "held"
    assert judge([], Question(BAD)) == Verdict("live")
    assert json.loads(json.dumps(given.described()))["broken"][1]["why"] == given.broken[1].why


@pytest.mark.parametrize(
    ("rule", "own", "note"),
    [
        ("own >= live + 0.02", None, "the expert names no task of its own"),
        ("own >= live + 0.02", "legal", "the expert's task `legal` is not scored"),
        ("own >= base + 0.02", "maze", "the base has no score for what it is about"),
        ('"maze" >= base', None, "the base has no score for what it is about"),
        ("each >= expert - 0.05", None, "the expert by itself has no scores"),
    ],
)
def test_what_a_rule_is_not_about_is_said(rule: str, own: str | None, note: str) -> None:
    given = verdict(rule, GOOD, live=LIVE, base=accuracies(sort=0.5), own=own)
    assert given == Verdict("live", notes=(f"`{rule}` does not apply: {note}",))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("each >= live", "no score for maze, by which the live version was scored"),
        ("mean >= live", "no score for maze, by which the live version was scored"),
        ("own >= live", "no score for maze, by which the live version was scored"),
        ('"sort" >= live', "no score for maze, by which the live version was scored"),
        ('"maze" >= 0.5', r"no score for `maze`, which the rule `\"maze\" >= 0.5` names"),
    ],
)
def test_what_the_evaluator_left_out_is_never_passed_over(rule: str, said: str) -> None:
    with pytest.raises(NoScores, match=said) as no:
        verdict(rule, accuracies(sort=0.9, parity=0.9), live=LIVE, own="maze")
    assert no.value.hint


def test_what_only_the_new_one_was_scored_by_is_compared_with_no_other() -> None:
    assert verdict("each >= live", LIVE | accuracies(new=0.0), live=LIVE).outcome == "live"
    assert verdict("mean >= live", LIVE | accuracies(new=0.0), live=LIVE).outcome == "live"
    assert verdict("each >= 0.1", LIVE | accuracies(new=0.0), live=LIVE).outcome == "held"


def test_a_task_whose_better_changed_is_an_error() -> None:
    with pytest.raises(NoScores, match="which scores of `sort` are better"):
        verdict("each >= live", {"sort": Score(0.9, higher_is_better=False)}, live=accuracies(sort=0.9))


def test_no_number_keeps_no_rule() -> None:
    """Scores that are read are finite; should one not be, it is not let through."""
    for rule in ("each >= live", "mean >= live", "each >= 0.1"):
        assert verdict(rule, accuracies(sort=math.nan), live=accuracies(sort=0.1)).outcome == "held"


def test_what_is_needed_is_known_beforehand() -> None:
    rules = [parse(text) for text in ("each >= live", "own >= base", "mean >= live + 1", '"sort" >= 0.7')]
    assert needs(rules) == {"live", "base"} and needs(rules[3:]) == set()
