"""Holds what the demo prints against what it is for: `make demo | python -m tests.demo_table`, and the demo's test.

Every merged version has to be in the table, and the last one has to read the places of all experts at 80 % or more.
Before the table stands that the expert with wrong labels was kept out, and that consumers followed back and forth.
"""

import re
import sys
from collections.abc import Iterable

VERSIONS = list(range(1, 9))
LEAST = 80.0  # per cent, the last merged mean
SAID = (
    r"^dropped right_shuffled into the inbox: it is quarantined, main/4 is live$",
    r"^ +a merged model with it breaks a rule: `mean >= live else reject`: ",
    r"^consumers get main/7, [\d.]+ s after",
    r"^consumers get main/8, [\d.]+ s after",
    r"^wrote .*report\.html",
)


def check(printed: str) -> None:
    """ValueError, saying what is wrong, where the table is not what it has to be."""
    rows = re.findall(r"^│ merged main/(\d+)\s+│.*│\s*([\d.]+)\s*│$", printed, re.MULTILINE)
    if [int(version) for version, _ in rows] != VERSIONS:
        raise ValueError(f"the merged versions in the demo's table are {[version for version, _ in rows]}")
    if (mean := float(rows[-1][1])) < LEAST:
        raise ValueError(f"the last merged version reads {mean} %, and should read {LEAST} % or more")
    for line in SAID:
        if not re.search(line, printed, re.MULTILINE):
            raise ValueError(f"no line of the demo is like {line}")


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
