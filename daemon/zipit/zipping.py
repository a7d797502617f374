"""Zips models one after the other: each that comes with what the others have become.

With t models the earlier ones count (t-1)/t and the newest 1/t, so that all count alike in the end. Up to a node only,
what lies behind stays each model's own: its head, which reads the zipped features by its columns of U.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn

from daemon.checkpoints.checkpoint import open_path
from daemon.errors import Reason, Refused
from daemon.zipit.calibration import Calibration, call, open_calibration
from daemon.zipit.families import family_graph
from daemon.zipit.features import GRAPH_HINT, first_output, gathered, normed
from daemon.zipit.sequential import sequential_graph
from daemon.zipit.writing import Head, check_out, write_heads, write_whole
from projector.spec import Schema, TensorSpec
from projector.text import listed, shown
from projector.zipping.applying import axes_of, check_alike, cosine, shared_names, shuffled, unmerged, zip_tensor
from projector.zipping.graph import Graph
from projector.zipping.pairing import Pairing, pair

SAME_BASE = 0.5  # cosine of the weights of two models that come from one base; fine-tuning leaves it near 1
SAME_OUTPUT = 1e-3  # how far rounding moves what a model gives, in units of its largest value
SEED = 0  # of the order in which features are shuffled to try the graph

Say = Callable[[str], None]


@dataclass(frozen=True)
class How:
    """What the person chose. to: the last node that is zipped; None for all."""

    alpha: float = 0
    beta: float = 1
    to: str | None = None


@dataclass(frozen=True)
class Met:
    """One node in one step. rows: of features, of either model. dead: how many of both models' features were constant.
    across, within, alone: of how many zipped features both models are part, several features of one, or one alone.
    correlation: the mean at which they were put together.
    """

    step: int
    node: str
    features: int
    rows: int
    dead: int
    across: int
    within: int
    alone: int
    correlation: float


@dataclass(frozen=True)
class Zipped:
    """What was done. heads: the folders of models of their own in OUT, for a partial zip."""

    out: str
    models: list[str]
    to: str | None
    alpha: float
    beta: float
    heads: list[str]
    nodes: list[Met]
    shared_bytes: int
    own_bytes: int
    warnings: list[str]
    seconds: float


@dataclass
class _Model:
    """A checkpoint: its weights, in float32 at least, and the dtypes that they have in their file."""

    path: Path
    weights: dict[str, Tensor]
    dtypes: Mapping[str, torch.dtype]
    files: Sequence[str]
    sha256: str

    @property
    def schema(self) -> Schema:
        return {name: TensorSpec(name, tuple(one.shape), one.dtype) for name, one in self.weights.items()}


def graph_of(path: Path, data: Path) -> Graph:
    """The graph of a model, where it is one that is known. Raises Refused."""
    model = _opened(path)
    return _graph(open_calibration(data, path).module(model.weights, path), model)


def zipit(
    paths: Sequence[Path], data: Path, out: Path, how: How, graph: Graph | None = None, say: Say = lambda _: None
) -> Zipped:
    """Zips two models or more into the folder `out`, which must not exist: it appears whole or not at all.

    graph: the person's own; else that of the first model, where it is one that is known. say hears of each step.
    Raises Refused, BadParameter, BadSchema, BadValues or OSError.
    """
    started = monotonic()
    check_out(out)
    if len(paths) < 2:
        raise Refused(Reason.ZIPIT, "one model has nothing to be zipped with", "name two models or more")
    calibration = open_calibration(data, paths[0])
    first = _opened(paths[0])
    running = calibration.module(first.weights, first.path)
    graph = graph or _graph(running, first)
    sizes = graph.sizes(first.schema)
    zipping = graph.upto(how.to)
    say("trying the graph: the first model with its features shuffled must compute the same")
    _try(graph, sizes, calibration, running, first)
    whole = how.to is None
    names = shared_names(zipping, list(first.weights), whole=whole)
    shared = {name: first.weights[name] for name in names}
    heads = [replace(first, weights={k: v for k, v in first.weights.items() if k not in shared})]
    models, met, warnings = [first], list[Met](), list[str]()
    for number, path in enumerate(paths[1:], 2):
        model = _opened(path)
        check_alike(zipping, first.schema, model.schema, whole=whole)
        if graph.one_base:
            _check_one_base(zipping, shared, model, names)
        say(f"{path.name}: running it beside {'what was zipped' if number > 2 else first.path.name}")
        both = [running, calibration.module(model.weights, path)]
        weights = ((number - 1) / number, 1 / number)
        pairings: dict[str, Pairing] = {}
        for node, moments in gathered(calibration, both, zipping.nodes, sizes):
            found = pair(moments.correlation(), weights, how.alpha, how.beta)
            pairings[node.name] = found
            dead = int(moments.dead().sum())
            met.append(
                Met(number, node.name, found.size, moments.rows, dead, **found.counted(), correlation=found.merit)
            )
            warnings += _warned(met[-1])
        shared, heads = _joined(zipping, shared, heads, model, pairings, weights, whole=whole)
        models.append(model)
        for head in heads:
            _reset(calibration, shared, head)
        running = calibration.module({**shared, **heads[0].weights}, first.path)
    named = _names(paths)
    result = Zipped(
        out=str(out),
        models=[str(path) for path in paths],
        to=how.to,
        alpha=how.alpha,
        beta=how.beta,
        heads=[] if whole else [f"heads/{name}" for name in named],
        nodes=met,
        shared_bytes=_bytes(shared, first.dtypes),
        own_bytes=sum(_bytes(head.weights, head.dtypes) for head in heads),
        warnings=warnings,
        seconds=monotonic() - started,
    )
    record = asdict(result) | {"sha256": [model.sha256 for model in models], "graph": graph.described()}
    whose = [
        Head(name, head.path, head.files, head.weights, head.dtypes) for name, head in zip(named, heads, strict=False)
    ]
    if whole:
        write_whole(out, whose[0], shared, first.dtypes, record)
    else:
        write_heads(out, whose, shared, first.dtypes, record)
    return result


def _opened(path: Path) -> _Model:
    with open_path(path) as found:
        if found.kind == "adapter":
            raise Refused(
                Reason.ZIPIT,
                f"{path.name} is an adapter, and zipping needs whole models",
                "merge it into its base first: peft's merge_and_unload(), then save_pretrained",
            )
        schema = found.tensors.schema
        weights = {}
        for name, spec in schema.items():
            tensor = found.tensors.read(name)
            if spec.floating and not tensor.isfinite().all():
                raise Refused(Reason.ZIPIT, f"{path.name}: {shown(name)} has NaN or infinity", "train or save it again")
            exact = not spec.floating or spec.dtype in (torch.float64, torch.float32)
            weights[name] = tensor if exact else tensor.to(torch.float32)
        files = [file.name for file in found.files] if found.folder is not None else []
        dtypes = {name: spec.dtype for name, spec in schema.items()}
        return _Model(path, weights, dtypes, files, found.identity())


def _graph(running: nn.Module, model: _Model) -> Graph:
    if isinstance(running, nn.Sequential):
        return sequential_graph(running)
    return family_graph(running, model.weights)


def _try(graph: Graph, sizes: Mapping[str, int], calibration: Calibration, running: nn.Module, model: _Model) -> None:
    """Shuffles the features of every node, through all that makes and reads them: if then the model computes something
    else, the graph misses something. Raises Refused, which names the nodes that are wrong by themselves.
    """
    batch = next(iter(calibration.batches()), None)
    if batch is None:
        raise Refused(Reason.ZIPIT, "the calibration data has no batch", "let it yield what the model is called with")
    draw = torch.Generator().manual_seed(SEED)
    orders = {name: torch.randperm(size, generator=draw) for name, size in sizes.items()}

    def computed(module: nn.Module) -> Tensor:
        with torch.inference_mode():
            return first_output(call(module, batch)).double()

    right = computed(running)
    if not right.isfinite().all():
        raise Refused(
            Reason.ZIPIT,
            f"{model.path.name} gives NaN or infinity on the calibration data",
            "find which input makes it so, and leave that out",
        )

    def off(some: Mapping[str, Tensor]) -> bool:
        part = Graph([node for node in graph.nodes if node.name in some])
        module = calibration.module(shuffled(model.weights, part, some), model.path)
        return bool((computed(module) - right).abs().max() > SAME_OUTPUT * right.abs().max())

    if off(orders):
        wrong = [name for name, order in orders.items() if off({name: order})]
        what = f"with the features of {listed(wrong or orders)} shuffled the model computes something else"
        hint = f"the graph lacks a tensor that makes, scales or reads them, or has a wrong axis: {GRAPH_HINT}"
        raise Refused(Reason.ZIPIT, what, hint)


def _check_one_base(graph: Graph, shared: Mapping[str, Tensor], model: _Model, names: Sequence[str]) -> None:
    axes, schema = axes_of(graph), model.schema
    averaged = [name for name in names if name not in axes and name in schema]
    alike = cosine(
        shared, model.weights, [name for name in averaged if schema[name].merged and not schema[name].vector]
    )
    if alike < SAME_BASE:
        raise Refused(
            Reason.ZIPIT,
            f"{model.path.name} does not come from the base of the others (cosine {alike:.2f}), and this graph averages"
            " what lies outside of its nodes",
            "zip fine-tunes of one base; or describe a graph whose nodes have the other features too, with --graph",
        )


def _joined(
    graph: Graph,
    shared: Mapping[str, Tensor],
    heads: Sequence[_Model],
    model: _Model,
    pairings: Mapping[str, Pairing],
    weights: tuple[float, float],
    *,
    whole: bool,
) -> tuple[dict[str, Tensor], list[_Model]]:
    """What is shared and the heads, with one model more."""
    axes = axes_of(graph)

    schema = model.schema

    def zipped(name: str, tensor: Tensor) -> Tensor:
        if name not in schema or not schema[name].merged:
            return tensor
        return zip_tensor([tensor, model.weights[name]], axes.get(name), pairings, weights).to(tensor.dtype)

    def own(one: _Model, place: int) -> _Model:
        read = {
            name: unmerged(tensor.double(), axes[name], pairings, place).to(tensor.dtype) if name in axes else tensor
            for name, tensor in one.weights.items()
            if name not in shared
        }
        return replace(one, weights=read)

    together = {name: zipped(name, tensor) for name, tensor in shared.items()}
    if whole:
        return together, list(heads)
    return together, [*(own(head, 0) for head in heads), own(model, 1)]


def _reset(calibration: Calibration, shared: dict[str, Tensor], head: _Model) -> None:
    """Takes the statistics of BatchNorm layers anew, in place: zipped ones are of no data."""
    statistics = normed(calibration, calibration.module({**shared, **head.weights}, head.path))
    for name, tensor in statistics.items():
        place = shared if name in shared else head.weights
        if name not in place:
            raise Refused(Reason.ZIPIT, f"{shown(name)} is not called so in {head.path.name}", "give a FILE.py")
        place[name] = tensor.to(place[name].dtype)


def _warned(met: Met) -> list[str]:
    """What makes the correlations of a node doubtful."""
    said = []
    if met.rows < 2 * met.features:
        said.append(
            f"{met.node}: {met.rows} rows for {2 * met.features} features: more data would tell them apart better"
        )
    if 2 * met.dead > met.features:
        said.append(f"{met.node}: {met.dead} of {2 * met.features} features were constant, and zipped as they came")
    return said


def _names(paths: Sequence[Path]) -> list[str]:
    """What the heads are called: as their models, with a number where two are called alike."""
    stems = [path.absolute().name.removesuffix(".safetensors") for path in paths]
    return [stem if stems.count(stem) == 1 else f"{stem}-{number}" for number, stem in enumerate(stems, 1)]


def _bytes(weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> int:
    return sum(tensor.numel() * dtypes[name].itemsize for name, tensor in weights.items())
