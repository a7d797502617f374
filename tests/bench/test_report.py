"""docs/performance.md is what the checked-in results say, and the arithmetic behind it is right."""

import pytest

from bench.report import DOCUMENT, ROWS, document, results
from bench.trend import trend

OPCM = {
    "backlog": {"median": 2.0, "peak_bytes": 100},
    "ready": {"median": 0.5, "peak_bytes": 90},
    "fusionbench": {"median": 6.2, "peak_bytes": 490},
}


def test_the_document_is_the_generators() -> None:
    assert DOCUMENT.read_text() == document(results())


def test_every_promise_has_a_row_without_a_result() -> None:
    lines = document({}).splitlines()
    for row in ROWS:
        assert any(line.startswith(f"| {row.work} | {row.target} | - | not measured") for line in lines)


def test_ratios_are_judged_by_their_targets() -> None:
    backlog, ready, memory = (row.read(OPCM) for row in ROWS if row.source == "opcm")
    assert (backlog.measured, backlog.verdict) == ("3.1x", "met")
    assert (ready.measured, ready.verdict) == ("12.4x", "met")
    assert (memory.measured, memory.verdict) == ("1/4.9", "**missed**")


def test_a_measurement_beside_other_work_is_not_judged() -> None:
    quiet, busy = ({"opcm": {"machine": {"others": others}, "figures": OPCM}} for others in (0.01, 0.3))
    row = next(row for row in ROWS if row.source == "opcm")
    assert row.line(quiet).endswith("| 3.1x | met |")
    assert row.line(busy).endswith("| - | measure again: other programs took 30% of the machine |")


def test_without_the_other_tool_a_row_says_so() -> None:
    for row in ROWS:
        if row.source == "opcm":
            assert row.read({**OPCM, "fusionbench": None}).verdict == "not compared: FUSIONBENCH_PYTHON was not given"


def test_a_line_is_fitted() -> None:
    line = trend([2, 4, 6], [5.0, 9.0, 13.0])
    assert line.slope == pytest.approx(2)
    assert line.fit == pytest.approx(1)
    assert line.moves == pytest.approx(8 / 9)
    assert trend([1, 2, 3], [4.0, 4.0, 4.0]).moves == 0
