"""What becomes of a head that trainers start from, by its method: real training, round after round.

    python -m bench.init_heads [METHOD ...]

The demo's digits, twelve rounds over its eight tasks: each expert is trained from what the head is by then, and merged
into it as its way from the base. Printed, as docs/time.md has it: how far the head is from the base after some rounds,
where the first expert's way is 1, and what it reads in the end: of the base's own place, and on average of the eight.
A few seconds a round; nothing else is timed, so other programs may run.
"""

import sys
from collections.abc import Mapping
from math import fsum, sqrt

from torch import Tensor

from daemon.demo.digits import CENTRE, TASKS, accuracy, finetune, pretrain
from projector.algebra.linalg import energy
from projector.laws.trial import merge
from projector.method import Method
from projector.methods import make

METHODS = ("ema", "mean", "recency", "latest", "confluence", "opcm", "task_arithmetic", "iso_c")
ROUNDS = 12
SHOWN = (1, 4, 8, 12)

Weights = Mapping[str, Tensor]


def main() -> None:
    base = pretrain(_silent)
    print(f"| `init` | {' | '.join(f'round {number}' for number in SHOWN)} | the base's own | the eight |")
    print(f"|---|{'---|' * (len(SHOWN) + 2)}")
    for name in sys.argv[1:] or METHODS:
        lengths, last = rounds(make(name), base)
        read = [accuracy(last, task) for task in (CENTRE, *TASKS)]
        far = " | ".join(f"{lengths[number - 1]:.3g}" for number in SHOWN)
        print(f"| `{name}` | {far} | {read[0]:.1%} | {fsum(read[1:]) / len(TASKS):.1%} |", flush=True)


def rounds(method: Method, base: Weights) -> tuple[list[float], Weights]:
    """How far the head is from the base after each round, and what it is after the last."""
    now, experts, lengths = base, list[Weights](), list[float]()
    for number in range(ROUNDS):
        experts.append(finetune(now, TASKS[number % len(TASKS)], _silent))
        now = merge(method, base, experts)[0]
        lengths.append(_apart(now, base) / _apart(experts[0], base))
    return lengths, now


def _apart(one: Weights, other: Weights) -> float:
    return sqrt(fsum(energy(tensor.double() - other[name].double()) for name, tensor in one.items()))


def _silent(line: str) -> None:
    pass


if __name__ == "__main__":
    main()
