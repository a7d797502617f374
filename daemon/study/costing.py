"""What one method costs by itself: in a home with that head alone, where nothing else is in its seconds and bytes.

The memory is the most that this process held while an expert was merged, beyond what it held before: Linux's VmHWM,
set back before, less VmRSS then, once what was freed had been given back. On a CUDA device it is the host's part.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

from daemon.compute.resources import return_freed_memory
from daemon.disk import durable
from daemon.layout import Home
from daemon.study.course import Course, Shared
from daemon.study.planning import LeftOut, Unfit, Variant

ARRIVALS = 2  # the first loads what is loaded at first use, and has no state to read
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK_STARTS_OVER = "5"  # proc(5)


@dataclass(frozen=True, slots=True)
class Cost:
    """seconds: of one arrival. peak_bytes: of memory; None where this system does not tell."""

    seconds: float
    peak_bytes: int | None


def cost(folder: Path, variant: Variant, experts: Sequence[str], shared: Shared) -> Cost | LeftOut:
    """Measured once, and kept in `folder` under the head's name. experts: those that arrive, known to be good by now:
    where one is refused, it is by what the method makes of it.
    """
    kept, home = folder / f"{variant.head}.json", Home(folder / variant.head)
    if kept.exists():
        content = json.loads(kept.read_bytes())
        return Cost(**content) if "seconds" in content else LeftOut(**content)
    durable.remove(home.root)
    with Course(home, {variant.head: variant.method}, shared) as course:
        try:
            found: Cost | LeftOut = [_measured(course, name) for name in experts[:ARRIVALS]][-1]
        except Unfit as error:
            found = LeftOut(variant.label, str(error), "try other values of its parameters")
    durable.replace_file(kept, json.dumps(asdict(found)).encode())
    durable.remove(home.root)
    return found


def _measured(course: Course, name: str) -> Cost:
    return_freed_memory()
    before = _start_over()
    begun = monotonic()
    course.take(name)
    seconds = monotonic() - begun
    return Cost(seconds, None if before is None else max(0, _memory("VmHWM") - before))


def _start_over() -> int | None:
    """Sets the peak back; the bytes in memory now, None where that cannot be done."""
    try:
        CLEAR.write_text(PEAK_STARTS_OVER)
        return _memory("VmRSS")
    except (OSError, StopIteration):
        return None


def _memory(line: str) -> int:
    found = next(text for text in STATUS.read_text().splitlines() if text.startswith(line))
    return int(found.split()[1]) * 1024
