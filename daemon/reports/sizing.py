"""What one arrival, and a home at rest, take of disk, memory and time: worked out from the base, the heads' methods and
the settings alone. `inspect` and `doctor` say it, docs/memory.md has it as a formula.

Bytes of weights, states and records are exact, for the files' headers say them; a version's card and manifest come on
top (a few hundred bytes for each tensor and expert). Seconds are a guess, to be put right by the first arrivals.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.compute.resources import matrix_sides, memory_budget, workers
from daemon.config import Settings
from daemon.layout import CARD, Home, is_weights
from daemon.manifest import Manifest
from daemon.versions.weight_files import METADATA
from daemon.versions.writing import weights_plan
from projector.driver.averages import rule_of
from projector.driver.steps import largest_step, prepared_specs, record_specs, state_specs
from projector.files.header import build_header
from projector.method import Method
from projector.methods import make
from projector.spec import TensorSpec
from registry.reader import Reader

PROCESS_BYTES = 290 << 20  # Python and torch, with nothing in hand
BYTES_PER_SECOND = 1e9  # read, hashed, folded and written
FLOPS_PER_SECOND = 5e10  # of one worker, in float32
EIGH_SECONDS = 4e-10  # of one worker, for each n^3
MORE_PRODUCTS = 2  # than one `update` or `read` takes: an arrival takes both


@dataclass(frozen=True, slots=True)
class Sizing:
    """In bytes, of all heads together, and seconds.

    version_bytes: what one version publishes. state_bytes: its states, and its records of the expert where methods keep
    any. prepared_bytes: what is worked out while idle. arrival_bytes: what must be free for one arrival. home_bytes:
    the home at rest, without archive and quarantine, and without what the grace time and pins keep; heads with views
    keep a record of each expert on top. memory_bytes: at the most.
    """

    version_bytes: int
    state_bytes: int
    prepared_bytes: int
    read_bytes: int
    arrival_bytes: int
    home_bytes: int
    memory_bytes: int
    seconds: float


def sizing(
    base: OpenCheckpoint, beside_bytes: int, methods: Sequence[Method], settings: Settings, expert_bytes: int = 0
) -> Sizing:
    """Of a home with one head for each of the methods.

    beside_bytes: what every version has beside its weights. expert_bytes: of the expert that comes; 0 for one as large
    as the base.
    """
    schema, heads = base.tensors.schema, len(methods)
    files, index = weights_plan(base, settings.publish)
    weights = sum(_file_bytes(file.specs) for file in files) + (len(index.text) if index else 0)
    version = heads * (weights + beside_bytes)
    records = [record_specs(method, schema) for method in methods]
    states = [_file_bytes(state_specs(method, schema)) for method in methods]
    record = sum(_file_bytes(specs) for specs in records if specs)
    prepared = sum(_file_bytes(specs) for method in methods if (specs := prepared_specs(method, schema)))
    prepared = prepared if settings.compute.prepare else 0
    arrival = version + sum(states) + record
    read = base.size_bytes + (expert_bytes or base.size_bytes) + sum(states)
    kept = settings.retention.versions
    # the newest state and the one before; with views, that of every version
    states_kept = sum(size * (max(2, kept) if specs else 2) for size, specs in zip(states, records, strict=True))
    first = heads * (base.size_bytes + beside_bytes)
    _, step = largest_step(schema, methods, settings.compute.block_bytes)
    return Sizing(
        version_bytes=version,
        state_bytes=sum(states) + record,
        prepared_bytes=prepared,
        read_bytes=read,
        arrival_bytes=arrival,
        home_bytes=base.size_bytes + first + kept * version + states_kept + kept * record + prepared,
        memory_bytes=PROCESS_BYTES + max(step, memory_budget(settings.compute)),
        seconds=(read + arrival) / BYTES_PER_SECOND + _computing_seconds(base, methods, settings),
    )


def beside_bytes(home: Home, reader: Reader) -> int:
    """What every version has beside its weights, as version 0 has it."""
    head = reader.heads()[0].name
    files = Manifest.read(home.manifest(head, 0).read_bytes()).files
    return sum(file.size for name, file in files.items() if not is_weights(name) and name != CARD)


def of_home(home: Home, reader: Reader, settings: Settings) -> Sizing:
    """Of a home and an expert as large as its base. Raises what opening its base raises."""
    methods = [make(head.method, head.params) for head in reader.heads()]
    with open_path(home.base) as base:
        return sizing(base, beside_bytes(home, reader), methods, settings)


def _computing_seconds(base: OpenCheckpoint, methods: Sequence[Method], settings: Settings) -> float:
    """What the matrices take that a method does not take element by element, with nothing prepared."""
    merged = [spec for spec in base.tensors.schema.values() if spec.merged and len(spec.shape) > 1]
    rules = [(spec, rule_of(method, spec)) for spec in merged for method in methods]
    total = sum(_matrix_seconds(spec, rule) for spec, rule in rules if not rule.elementwise(spec))
    return total / workers(settings.compute.threads)


def _matrix_seconds(spec: TensorSpec, method: Method) -> float:
    """Of the products, and of a decomposition on the shorter side."""
    count, shorter, _ = matrix_sides(spec, method)
    return products_of(spec, method) / FLOPS_PER_SECOND + count * EIGH_SECONDS * shorter**3


def products_of(spec: TensorSpec, method: Method) -> int:
    """The multiplications that one arrival takes of a tensor with squares, by which is solved, too."""
    count, _, side = matrix_sides(spec, method)
    return (method.products + MORE_PRODUCTS) * spec.numel * side + count * side**3


def _file_bytes(specs: Sequence[TensorSpec]) -> int:
    return build_header(list(specs), METADATA)[1].size
