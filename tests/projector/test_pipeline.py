"""The pipeline: in order, within its budget, and it ends when it should."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from projector.errors import OverBudget, Reason
from projector.pipeline import MOST, SPARE, Pipeline


def test_results_come_in_order_whatever_takes_longest() -> None:
    def work(step: int) -> int:
        time.sleep(0.02 if step % 3 == 0 else 0)
        return step * step

    ran = Pipeline(3, 1000).run(range(20), lambda step: 10, lambda step: step, work)
    assert list(ran) == [step * step for step in range(20)]


@pytest.mark.parametrize("budget", [10, 25, 60, 1000])
def test_what_is_in_hand_stays_within_the_budget(budget: int) -> None:
    """Counted from reading a step to asking for the result after it, which is when its memory can go."""
    costs = [7, 3, 10, 1, 1, 1, 9, 4, 10, 2] * 3
    lock, held, most = threading.Lock(), 0, 0

    def read(step: int) -> int:
        nonlocal held, most
        with lock:
            held += costs[step]
            most = max(most, held)
        return step

    for step in Pipeline(4, budget).run(range(len(costs)), lambda step: costs[step], read, lambda step: step):
        with lock:
            held -= costs[step]
    assert most <= min(budget + 10, (4 + SPARE + 1) * 10), "the one whose result was just handed over counts as well"
    assert held == 0


def test_steps_that_cost_nothing_do_not_pile_up_behind_a_large_one() -> None:
    """What is made of each may take more than it was counted for, and all that is in hand is gone through each time."""
    handed, most = 0, 0

    def reading(step: int) -> int:
        nonlocal most
        most = max(most, step - handed)
        return step

    for step in Pipeline(2, 1 << 40).run(
        range(500), lambda step: 1 << 30 if not step else 1, reading, lambda step: step
    ):
        handed = step
    assert most <= MOST * (2 + SPARE) + 1


def test_steps_run_at_the_same_time_where_the_budget_allows() -> None:
    together = threading.Barrier(3, timeout=10)
    list(Pipeline(3, 100).run(range(3), lambda step: 10, lambda step: step, lambda step: together.wait()))


def test_a_step_beyond_the_budget_is_refused_by_both_numbers() -> None:
    with pytest.raises(OverBudget, match=r"101 bytes.*100") as caught:
        list(Pipeline(1, 100).run([0], lambda step: 101, lambda step: step, lambda step: step))
    assert caught.value.reason is Reason.OVER_BUDGET


def test_stop_finishes_what_is_begun_and_lets_go_of_the_rest() -> None:
    read: list[int] = []

    def stop() -> bool:
        return len(read) >= 2

    def reading(step: int) -> int:
        read.append(step)
        return step

    pipeline = Pipeline(1, 10)  # one at a time
    done = list(pipeline.run(range(100), lambda step: 10, reading, lambda step: step, stop))
    assert 2 <= len(read) <= 4
    assert done and done == read[: len(done)], "what was read and not begun is let go of"


@pytest.mark.parametrize("where", ["read", "work", "consumer"])
def test_an_error_anywhere_ends_it(where: str) -> None:
    class Broken(Exception):
        pass

    def failing(at: str, step: int) -> int:
        if at == where and step == 5:
            raise Broken
        return step

    def through() -> Iterator[int]:
        yield from Pipeline(2, 40).run(
            range(50), lambda step: 10, lambda step: failing("read", step), lambda step: failing("work", step)
        )

    before = threading.active_count()
    seen: list[int] = []
    with pytest.raises(Broken):
        seen.extend(failing("consumer", step) for step in through())
    assert seen == list(range(5))
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)  # an abandoned generator is closed when it is collected
    assert threading.active_count() == before


@pytest.mark.usefixtures("two_threads")
def test_workers_use_one_thread_each() -> None:
    (threads,) = Pipeline(1, 10).run([0], lambda step: 1, lambda step: step, lambda step: torch.get_num_threads())
    assert threads == 1
