"""The dry run behind `mainstem inspect`: everything that merging would check and measure, and nothing written."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from threading import Event
from typing import Any

from daemon.arrivals.admission import ENOUGH_TO_FLAG, USUAL_EXPERTS, Oddity, check_norm, oddities, usual_norm, worded
from daemon.arrivals.arrival import check_arrival
from daemon.arrivals.identity import twin_of
from daemon.arrivals.inbox import check_finished
from daemon.arrivals.recording import why_blocked
from daemon.arrivals.trained_from import Start, named_version
from daemon.checkpoints.adapter_modules import read_config
from daemon.checkpoints.checkpoint import open_path
from daemon.checkpoints.hints import hinting
from daemon.compute.progress import Progress
from daemon.config import load
from daemon.errors import DaemonError, Reason
from daemon.layout import Home
from daemon.notation import called
from daemon.reports.sizing import beside_bytes, sizing
from daemon.versions.heads import relative_heads
from daemon.versions.modules import check_modules
from projector.driver.head import Folded
from projector.driver.measure import overlap
from projector.lora.keys import tensor_parts
from projector.methods import is_layered, layer_scales, make
from projector.names.depth import layers
from projector.text import shown
from projector.watch import SILENT
from registry.reader import Reader
from registry.records import Expert


def inspect(home: Home, reader: Reader, path: Path, head_name: str | None) -> Mapping[str, Any]:
    """What `mainstem inspect` prints of an expert that would be accepted. Raises what merging would raise.

    overlap: the cosine between its task vector and the head's live one, in [-1, 1]. folded_onto: the newest, which may
    be another. held: why what comes of it will not be live by itself. renamed: by the expert's names of tensors, what
    they are in the base, where that is another name. ignored: those that are left out. unchanged: the base's that it
    lacks, and leaves as they are. layers: the lists of layers that the base's names tell of. layer_scales: of each head
    that scales task vectors by layer, its factors in the first layer and in the last.
    """
    head = reader.head(head_name) if head_name else reader.heads()[0]
    if head is None:
        raise DaemonError(Reason.UNKNOWN, f"there is no head {head_name!r}", "see `mainstem status` for the heads")
    if not path.exists():
        raise DaemonError(Reason.UNKNOWN, f"{path} does not exist", "give the path of a checkpoint")
    check_finished(path)
    methods = [make(row.method, row.params) for row in reader.heads()]
    needs = sorted({need for method in methods for need in method.needs})
    settings = load(home.config)
    limits = settings.admission
    with (
        hinting(path, home),
        open_path(home.base) as base,
        open_path(path, follow=False, needs=needs, naming=limits.naming) as expert,  # as the inbox would
        open_path(home.version(head.name, head.live)) as merged,
    ):
        own = tensor_parts(expert.tensors.schema) if expert.kind == "adapter" else expert.tensors.schema
        check_arrival(expert, base.tensors.schema)
        named = named_version(reader, expert.about)
        if named and relative_heads(reader):
            with ExitStack() as files:
                Start(home, named).opened(expert, files, SILENT)
        expert.check(base.tensors, read_config(home.base))
        check_modules(expert.folder, home.base)
        expert.digest_tensors()
        watch = Progress(Event(), lambda _: None)
        found = overlap(base.tensors, expert.tensors, merged.tensors, watch)
        norm = found.task_vector.whole
        norms = reader.merged_norms(limit=USUAL_EXPERTS)
        usual = usual_norm(norms, ENOUGH_TO_FLAG)
        twin = twin_of(home, reader, expert, norm, base.tensors, settings, again=False)
        if twin:  # of which no limit is asked
            odd: Sequence[Oddity] = ()
            warning, hint = _once_more(home, twin, head.name)
        elif blocked := reader.blocked(expert.identity(), expert.content()):
            odd, twin = (), blocked
            warning, hint = why_blocked(blocked)
        else:
            check_norm(Folded(found.task_vector, found.base, ()), usual_norm(norms), limits)
            odd = oddities(norm, usual, limits, expert.tensors.resized, expert.tensors.altered)
            warning, hint = worded(odd)
        schema = base.tensors.schema
        size = sizing(base, beside_bytes(home, reader), methods, settings, expert.size_bytes)
        names = expert.naming.resolve(own, schema)
        there = set(names.values())
        seconds = [v.seconds for v in reader.versions(head.name, limit=5) if v.seconds is not None]
        return {
            "kind": expert.kind,
            "within": expert.within,
            "weight": expert.weight,
            "renamed": {theirs: ours for theirs, ours in names.items() if theirs != ours},
            "ignored": [name for name in own if name not in names],
            "unchanged": [name for name in schema if expert.naming.lacks(name) and name not in there],
            "sha256": expert.identity(),
            "duplicate_of": twin.id if twin else None,
            "layers": [
                {"name": one.name, "first": one.first, "last": one.last, "tensors": len(one.tensors)}
                for one in layers(name for name, spec in schema.items() if spec.merged)
            ],
            "layer_scales": {row.name: layer_scales(row.params) for row in reader.heads() if is_layered(row.params)},
            "norm": norm,
            "norm_over_base": norm / found.base.whole,
            "norm_over_usual": norm / usual if usual else None,
            "flags": [one.flag for one in odd],
            "warning": warning,
            "hint": hint,
            "compared_with": called(head.name, head.live),
            "folded_onto": called(head.name, head.newest),
            "held": head.frozen,
            "overlap": found.cosine,
            "reads_bytes": size.read_bytes,
            "writes_bytes": size.arrival_bytes,
            "memory_bytes": size.memory_bytes,
            "usual_seconds": median(seconds) if seconds else None,
            "estimated_seconds": size.seconds,
        }


def _once_more(home: Home, twin: Expert, head: str) -> tuple[str | None, str | None]:
    """What to say of an expert that was merged before."""
    came = f", which came with {called(head, twin.version)}" if twin.version else ""
    what = (
        f"it is expert {twin.id} ({shown(twin.name)}) once more{came}: dropping it merges nothing, and makes no version"
    )
    if home.archived(twin.id) is None:
        return (
            what,
            "nothing is to be done; dropped all the same, it takes the place of that one's lost files in archive/",
        )
    return what, "nothing is to be done"
