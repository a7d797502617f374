"""The registry's records as JSON. What only the daemon itself needs (places on the disk, inodes) stays out."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from urllib.parse import quote

from daemon.checkpoints.hints import from_beside
from daemon.home.standing import Held
from daemon.layout import Home
from registry.records import BaseModel, Evaluation, Expert, Head, Version, plain_scores

Row = dict[str, object]


def head_row(head: Head, stays: Held | None, live: Evaluation | None, root: str = "") -> Row:
    """A head, with the address of its live manifest; `root` stands before it. stays: what is held of it. live: the
    evaluation of its live version.
    """
    return {
        "name": head.name,
        "method": head.method,
        "params": dict(head.params),
        "relative_to": head.relative_to,
        "live": head.live,
        "newest": head.newest,
        "frozen": head.frozen,
        "held": asdict(stays) if stays else None,
        "scores": _scores(live),
        "manifest": f"{root}/v1/heads/{quote(head.name, safe='')}/versions/{head.live}",
    }


def version_row(version: Version, head: Head, evaluation: Evaluation | None) -> Row:
    """One version of `head`; size in bytes, seconds spent on it. held: why it did not become live."""
    return {
        "version": version.number,
        "parent": version.parent,
        "live": version.number == head.live,
        "held": version.held,
        "verdict": _verdict(version),
        "scores": _scores(evaluation),
        "pinned": version.pinned,
        "collected": version.collected,
        "manifest_sha256": version.manifest_sha256,
        "size_bytes": version.size_bytes,
        "expert_id": version.expert_id,
        "figures": _finite(version.figures),
        "seconds": version.seconds,
        "created_at": _time(version.created_at),
    }


def expert_row(expert: Expert, home: Home, evaluation: Evaluation | None = None) -> Row:
    """One arrival, merged or not; the evaluation is that of the expert by itself. No path says where the home is."""
    return {
        "id": expert.id,
        "name": expert.name,
        "kind": expert.kind,
        "sha256": expert.sha256,
        "size_bytes": expert.size_bytes,
        "status": expert.status,
        "version": expert.version,
        "withdrawn_in": expert.withdrawn_in,
        "norm": _finite({"norm": expert.norm})["norm"],
        "flags": list(expert.flags),
        "trained_from": expert.trained_from,
        "about": dict(expert.about) if expert.about is not None else None,
        "sidecars": dict(expert.sidecars) if expert.sidecars is not None else None,
        "naming": dict(expert.naming) if expert.naming is not None else None,
        "blocked": expert.blocked,
        "verdict": _verdict(expert),
        "scores": _scores(evaluation),
        "duplicate_of": expert.duplicate_of,
        "reason": expert.reason,
        "detail": expert.detail and from_beside(expert.detail, home),
        "hint": expert.hint and from_beside(expert.hint, home),
        "received_at": _time(expert.received_at),
        "finished_at": _time(expert.finished_at),
        "closed_at": _time(expert.closed_at),
    }


def data_row(expert: Expert) -> Row:
    """What an expert was trained on, as far as it says so, and from which version."""
    data = [{"uri": one} if isinstance(one, str) else one for one in (expert.about or {}).get("data", ())]
    return {
        "id": expert.id,
        "name": expert.name,
        "sha256": expert.sha256,
        "version": expert.version,
        "weight": expert.weight,
        "trained_from": expert.trained_from,
        "data": [{"uri": one.get("uri"), "sha256": one.get("sha256")} for one in data],
    }


def base_row(base: BaseModel) -> Row:
    """The base model."""
    return {
        "name": base.name,
        "sha256": base.sha256,
        "parameters": base.parameters,
        "size_bytes": base.size_bytes,
        "created_at": _time(base.created_at),
    }


def _scores(evaluation: Evaluation | None) -> Mapping[str, object] | None:
    return plain_scores(evaluation.scores) if evaluation else None


def _verdict(judged: Version | Expert) -> Row | None:
    return dict(judged.verdict) if judged.verdict is not None else None


def _finite(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """JSON has no infinity and no NaN: they become null."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in figures.items()}


def _time(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment is not None else None
