"""Reads ahead, computes in workers, and hands the results over in order, in bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

from projector.driver.device import threads
from projector.errors import OverBudget

MOST = 8  # steps in hand for each worker and spare one, however small they are
SPARE = 2  # steps in hand beside one for each worker: one being read, one being written
Step = TypeVar("Step")
In = TypeVar("In")
Out = TypeVar("Out")


def never() -> bool:
    return False


@dataclass(frozen=True)
class Pipeline:
    """How wide and how deep: worker threads, the bytes that all steps in hand may need together, and whose threads."""

    workers: int
    budget_bytes: int
    threads: Callable[[int], AbstractContextManager[Executor]] = threads

    def run(
        self,
        steps: Iterable[Step],
        cost: Callable[[Step], int],
        read: Callable[[Step], In],
        work: Callable[[In], Out],
        stop: Callable[[], bool] = never,
    ) -> Iterator[Out]:
        """work(read(step)) of every step, in order.

        One thread reads, `workers` threads work, the caller's has the results. A step is taken in hand once its cost,
        in bytes, fits beside what is there, and in hand it is until the next result is asked for. Workers use
        single-threaded linear algebra, so that the bits do not depend on their number. Once `stop` says so, no further
        step is worked on. Raises OverBudget where one step alone does not fit.
        """
        hand: deque[tuple[Future[Out], int]] = deque()
        with ThreadPoolExecutor(1, "read") as reader, self.threads(self.workers) as pool:
            try:
                for step in steps:
                    if stop():
                        break
                    need = cost(step)
                    if need > self.budget_bytes:
                        raise OverBudget(
                            f"one tensor needs {need} bytes of memory, the budget is {self.budget_bytes}",
                            "raise the memory budget",
                        )
                    while len(hand) >= MOST * (self.workers + SPARE) or (
                        hand and _sum(hand) + need > self._limit(max(need, *(need for _, need in hand)))
                    ):
                        yield hand[0][0].result()
                        hand.popleft()
                    hand.append((pool.submit(_then, reader.submit(read, step), work), need))
                while hand:
                    if stop():
                        hand = deque(one for one in hand if not one[0].cancel())
                    if hand:
                        yield hand[0][0].result()
                        hand.popleft()
            finally:
                for future, _ in hand:
                    future.cancel()
                wait([future for future, _ in hand])  # the threads may outlast this run: nothing of it may

    def _limit(self, largest: int) -> int:
        """What may be in hand: a step for each worker and the spare ones, where all are as large as the largest."""
        return min(self.budget_bytes, largest * (self.workers + SPARE))


def _then(read: Future[In], work: Callable[[In], Out]) -> Out:
    return work(read.result())


def _sum(hand: Iterable[tuple[object, int]]) -> int:
    return sum(need for _, need in hand)
