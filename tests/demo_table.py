"""Holds what the demo prints against what it is for: `make demo | python -m tests.demo_table`, and the demo's test.

Every merged version has to be in the table, and the last one has to read the places of all experts at 80 % or more.
"""

import re
import sys
from collections.abc import Iterable

VERSIONS = list(range(1, 9))
LEAST = 80.0  # per cent, the last merged mean


def check(printed: str) -> None:
    """ValueError, saying what is wrong, where the table is not what it has to be."""
    rows = re.findall(r"^│ merged main/(\d+)\s+│.*│\s*([\d.]+)\s*│$", printed, re.MULTILINE)
    if [int(version) for version, _ in rows] != VERSIONS:
        raise ValueError(f"the merged versions in the demo's table are {[version for version, _ in rows]}")
    if (mean := float(rows[-1][1])) < LEAST:
        raise ValueError(f"the last merged version reads {mean} %, and should read {LEAST} % or more")


def echoed(lines: Iterable[str]) -> str:
    """The whole of it, printed line by line as it comes."""
    heard = []
    for line in lines:
        print(line, end="", flush=True)
        heard.append(line)
    return "".join(heard)


if __name__ == "__main__":
    try:
        check(echoed(sys.stdin))
    except ValueError as error:
        sys.exit(str(error))
