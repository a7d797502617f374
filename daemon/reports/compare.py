"""The measurements behind `mainstem compare`: two published versions, and what each keeps of the experts."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from daemon.arrivals.admission import naming_of
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.config import load
from daemon.errors import DaemonError, Reason
from daemon.layout import Home
from daemon.notation import called, find_version
from projector.driver.measure import Pair, pairs
from projector.files.source import Checkpoint
from registry.reader import Reader
from registry.records import Expert, Version

PARAMETER_NAMES = ("weight", "bias")


def find_published(reader: Reader, words: str) -> Version:
    """The version that is named so. Raises DaemonError where there is none, or retention has removed its files."""
    version = find_version(reader, words)
    if version.collected:
        kept = reader.versions(version.head, include_collected=False)
        raise DaemonError(
            Reason.UNKNOWN,
            f"the files of {called(version.head, version.number)} were removed by retention",
            f"there are still {', '.join(called(one.head, one.number) for one in kept)}",
        )
    return version


def compare(home: Home, reader: Reader, a: Version, b: Version, *, experts: bool = False) -> dict[str, Any]:
    """What `mainstem compare` prints: norms and cosines of both merged task vectors by layer group and in total.

    experts: also each merged expert's norm, the share <tau, merged> / ||tau||^2 of it that each version keeps, and its
    cosine with each; None for one that is no longer in the archive. Every archived expert is read for that.
    """
    with open_path(home.base) as base, ExitStack() as versions:
        opened = [versions.enter_context(open_path(home.version(one.head, one.number))) for one in (a, b)]
        groups = pairs(base.tensors, opened[0].tensors, [opened[1].tensors], layer_group)
        found: dict[str, Any] = {
            "a": called(a.head, a.number),
            "b": called(b.head, b.number),
            "groups": [{"group": group, **_described(pair)} for group, (pair,) in groups.items()],
            "total": _described(sum((pair for (pair,) in groups.values()), Pair())),
        }
        if experts:
            merged = [one.tensors for one in opened]
            newest = max(a.number, b.number)
            found["experts"] = [
                _kept(home, base, merged, expert) for expert in reader.lineage() if (expert.version or 0) <= newest
            ]
        return found


def layer_group(tensor: str) -> str:
    """The layers that a tensor is listed with: its module's name with each number in it replaced by *.

    >>> layer_group("encoder.layer.11.attention.self.query.weight")
    'encoder.layer.*.attention.self.query'
    """
    parts = ["*" if part.isdecimal() else part for part in tensor.split(".")]
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] in PARAMETER_NAMES else parts)


def _kept(home: Home, base: OpenCheckpoint, merged: Sequence[Checkpoint], expert: Expert) -> dict[str, Any]:
    known = {"id": expert.id, "name": expert.name, "sha256": expert.sha256, "version": expert.version}
    path = home.archived(expert.id)
    if path is None:
        return {**known, "norm": expert.norm} | dict.fromkeys(("a_kept", "b_kept", "a_cosine", "b_cosine"))
    with open_path(path, follow=False, naming=naming_of(expert, load(home.config).admission)) as opened:
        opened.check(base.tensors)
        (both,) = pairs(base.tensors, opened.tensors, merged, lambda _: "").values()
    a, b = both
    return {
        **known,
        "norm": a.a_norm,
        "a_kept": a.kept,
        "b_kept": b.kept,
        "a_cosine": a.cosine,
        "b_cosine": b.cosine,
    }


def _described(pair: Pair) -> Mapping[str, Any]:
    return {
        "tensors": pair.tensors,
        "parameters": pair.parameters,
        "a_norm": pair.a_norm,
        "b_norm": pair.b_norm,
        "cosine": pair.cosine,
    }
