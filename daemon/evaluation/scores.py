"""What an evaluator's output says: a score for each task."""

from registry.records import Scores

MOST_BYTES = 16 << 20
MOST_TASKS = 256
MOST_NAME = 100


def read_scores(output: bytes) -> Scores:
    """The scores in an evaluator's output: one JSON object, which is all of it or its last line.

    {task: number}, or {task: {"score", "higher_is_better", "n", "stderr", "held_out"}}, or the results file of
    lm-evaluation-harness. Raises NoScores.
    """
    raise NotImplementedError
