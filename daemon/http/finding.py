"""Which expert an address means: by its sha256, and for views also by its name or its id."""

import re

from daemon.http.answers import Problem
from daemon.http.computing import merged_at
from daemon.notation import told_apart
from registry.reader import Reader
from registry.records import Expert

MOST_FOUND = 1000  # arrivals that one name or digest may have here: the newest, and before them those that were merged


def arrivals(reader: Reader, prefix: str) -> list[Expert]:
    """Every arrival, MOST_FOUND of them at the most, of the one expert whose sha256 begins with that; none where no
    expert's does. Problem 409.
    """
    if not re.fullmatch(r"[0-9a-f]{4,64}", prefix):
        return []
    # The registry also searches by id and by name: keep what was found by its digest.
    found = [row for row in reader.find_experts(prefix, MOST_FOUND) if (row.sha256 or "").startswith(prefix)]
    if len({row.sha256 for row in found}) > 1:
        raise Problem(409, "ambiguous", f"several experts begin with that: {told_apart(found)}", "give more digits")
    return found


def merged(reader: Reader, text: str, n: int) -> Expert:
    """The merged expert with that id, or else with that sha256 or prefix of it, or that name, as version n has it.

    Of several the one that version n has; any where it has none of them. Problem 404 or 409.
    """
    found = reader.find_experts(text, MOST_FOUND)
    if not found and re.fullmatch(r"[0-9]{1,3}", text):  # too short for a sha256
        raise Problem(404, "not_merged", "no expert has that id", "GET /v1/lineage lists those that are merged")
    if not found:
        raise Problem(
            404, "unknown_expert", "no expert has that sha256, name or id", "GET /v1/lineage lists the experts"
        )
    once = [row for row in found if row.version is not None]
    if not once:
        raise Problem(404, "not_merged", "this expert is not merged", "GET /v1/lineage lists those that are")
    here = [row for row in once if merged_at(row, n)]
    if len({row.sha256 for row in here}) > 1:
        raise Problem(409, "ambiguous", f"that names several experts: {told_apart(here)}", "give the id of one")
    return (here or once)[0]
