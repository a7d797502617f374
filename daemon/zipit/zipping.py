"""Zips models one after the other: each that comes with what the others have become.

With t models the earlier ones count (t-1)/t and the newest 1/t, so that all count alike in the end. Up to a node only,
what lies behind stays each model's own: its head, which reads the zipped features by its columns of U.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor, nn

from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.checkpoints.hints import hinting
from daemon.checkpoints.weight_names import OF_A_MODEL
from daemon.disk.out import new_out
from daemon.errors import DaemonError, Reason, Refused
from daemon.zipit.calibration import Calibration, call, open_calibration
from daemon.zipit.families import family_graph
from daemon.zipit.features import GRAPH_HINT, features, first_output, gathered, normed, of_node
from daemon.zipit.sequential import sequential_graph
from daemon.zipit.writing import Head, write_heads, write_whole
from projector.errors import ProjectorError
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
    Raises BadConfig, Refused, BadParameter, BadSchema, BadValues or OSError.
    """
    started = monotonic()
    place = new_out(out, OF_A_MODEL)
    if len(paths) < 2:
        raise Refused(Reason.ZIPIT, "one model has nothing to be zipped with", "name two models or more")
    calibration = open_calibration(data, paths[0])
    first = _opened(paths[0])
    running = calibration.module(first.weights, first.path)
    graph = graph or _graph(running, first)
    sizes = graph.sizes(first.schema)
    course = _Course(calibration, how, graph.upto(how.to), sizes, first)
    say("trying the graph: the first model with its features shuffled must compute the same")
    _try(graph, sizes, calibration, running, first)
    digests = [first.sha256]
    for path in paths[1:]:
        model = _opened(path)
        say(f"{path.name}: running it beside {' and '.join(one.name for one in paths[: len(digests)])}")
        running = course.add(model, running)
        digests.append(model.sha256)
    names = _names(paths)
    result = Zipped(
        out=str(out),
        models=[str(path) for path in paths],
        to=how.to,
        alpha=how.alpha,
        beta=how.beta,
        heads=[] if course.whole else [f"heads/{name}" for name in names],
        nodes=course.met,
        shared_bytes=_bytes(course.shared, first.dtypes),
        own_bytes=sum(_bytes(head.weights, head.dtypes) for head in course.heads),
        warnings=[line for met in course.met for line in _warned(met)],
        seconds=monotonic() - started,
    )
    record = asdict(result) | {"sha256": digests, "graph": graph.described()}
    heads = [
        Head(name, head.path, head.files, head.weights, head.dtypes)
        for name, head in zip(names, course.heads, strict=False)  # a whole zip has one
    ]
    if course.whole:
        write_whole(place, heads[0], course.shared, first.dtypes, record)
    else:
        write_heads(place, heads, course.shared, first.dtypes, record)
    return result


class _Course:
    """What the models have become so far. shared: what they have in common. heads: each one's own weights, in a partial
    zip; else nothing, of the first one.
    """

    def __init__(
        self, calibration: Calibration, how: How, graph: Graph, sizes: Mapping[str, int], first: _Model
    ) -> None:
        self._calibration = calibration
        self._how = how
        self._graph = graph
        self._sizes = sizes
        self._first = first
        self._axes = axes_of(graph)
        self._models = 1
        self.whole = how.to is None
        names = shared_names(graph, list(first.weights), whole=self.whole)
        self.shared = {name: first.weights[name] for name in names}
        self.heads = [self._own(first)]
        self.met: list[Met] = []

    def add(self, model: _Model, running: nn.Module) -> nn.Module:
        """Takes one model more; running: what was zipped so far, as it is returned."""
        check_alike(self._graph, self._first.schema, model.schema, whole=self.whole)
        if self._graph.one_base:
            self._check_one_base(model)
        self._models += 1
        weights = (self._models - 1) / self._models, 1 / self._models
        pairings = self._paired([running, self._calibration.module(model.weights, model.path)], weights)
        if not self.whole:
            self.heads = [
                *(self._reading(head, pairings, 0) for head in self.heads),
                self._reading(self._own(model), pairings, 1),
            ]
        schema = model.schema
        for name, tensor in self.shared.items():
            if name in schema and schema[name].merged:
                both = [tensor, model.weights[name]]
                self.shared[name] = zip_tensor(both, self._axes.get(name), pairings, weights).to(tensor.dtype)
        for head in self.heads:
            self._reset(head)
        return self._calibration.module({**self.shared, **self.heads[0].weights}, self._first.path)

    def _paired(self, both: Sequence[nn.Module], weights: tuple[float, float]) -> dict[str, Pairing]:
        pairings = {}
        for node, moments in gathered(self._calibration, both, self._graph.nodes, self._sizes):
            with of_node(node):
                found = pair(moments.correlation(), weights, self._how.alpha, self._how.beta)
            pairings[node.name] = found
            dead, merit = int(moments.dead().sum()), found.merit
            counted = found.counted()
            self.met.append(Met(self._models, node.name, found.size, moments.rows, dead, **counted, correlation=merit))
        return pairings

    def _own(self, model: _Model) -> _Model:
        return replace(model, weights={name: one for name, one in model.weights.items() if name not in self.shared})

    def _reading(self, head: _Model, pairings: Mapping[str, Pairing], place: int) -> _Model:
        """A head that reads the zipped features. place: of which of the two models it is."""
        weights = {
            name: unmerged(one.double(), self._axes[name], pairings, place).to(one.dtype) if name in self._axes else one
            for name, one in head.weights.items()
        }
        return replace(head, weights=weights)

    def _reset(self, head: _Model) -> None:
        """Takes the statistics of BatchNorm layers anew: zipped ones are of no data."""
        statistics = normed(self._calibration, self._calibration.module({**self.shared, **head.weights}, head.path))
        for name, tensor in statistics.items():
            place = self.shared if name in self.shared else head.weights
            if name not in place:
                raise Refused(Reason.ZIPIT, f"{shown(name)} is not called so in {head.path.name}", "give a FILE.py")
            place[name] = tensor.to(place[name].dtype)

    def _check_one_base(self, model: _Model) -> None:
        schema = model.schema
        averaged = [name for name in self.shared if name not in self._axes and name in schema]
        names = [name for name in averaged if schema[name].merged and not schema[name].vector]
        alike = cosine(self.shared, model.weights, names)
        if alike < SAME_BASE:
            raise Refused(
                Reason.ZIPIT,
                f"{model.path.name} does not come from the base of the others (cosine {alike:.2f}), and this graph"
                " averages what lies outside of its nodes",
                "zip fine-tunes of one base; or describe a graph whose nodes have the other features too, with --graph",
            )


def _opened(path: Path) -> _Model:
    try:
        if not path.exists():
            raise Refused(Reason.ZIPIT, "there is nothing", "name a folder with a model, or a .safetensors file")
        with hinting(path), open_path(path) as found:
            return _read(path, found)
    except (DaemonError, ProjectorError) as error:
        raise Refused(error.reason, f"{path}: {error}", error.hint) from error


def _read(path: Path, found: OpenCheckpoint) -> _Model:
    if found.kind == "adapter":
        raise Refused(
            Reason.ZIPIT,
            "it is an adapter, and zipping needs whole models",
            "merge it into its base first: peft's merge_and_unload(), then save_pretrained",
        )
    weights, dtypes = {}, {}
    for name, spec in found.tensors.schema.items():
        tensor = found.tensors.read(name)
        if spec.floating and not tensor.isfinite().all():
            raise Refused(Reason.ZIPIT, f"{shown(name)} has NaN or infinity", "train or save it again")
        exact = not spec.floating or spec.dtype in (torch.float64, torch.float32)
        weights[name] = tensor if exact else tensor.to(torch.float32)
        dtypes[name] = spec.dtype
    files = [file.name for file in found.files] if found.folder is not None else []
    return _Model(path, weights, dtypes, files, found.identity())


def _graph(running: nn.Module, model: _Model) -> Graph:
    if isinstance(running, nn.Sequential):
        return sequential_graph(running)
    return family_graph(running, model.weights)


def _try(graph: Graph, sizes: Mapping[str, int], calibration: Calibration, running: nn.Module, model: _Model) -> None:
    """Shuffles the features of every node, through all that makes and reads them: if then the model computes something
    else, the graph misses something, and its features must be the same ones in that order. Raises Refused, which names
    the nodes that are wrong.
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

    def moved(some: Mapping[str, Tensor]) -> nn.Module:
        part = Graph([node for node in graph.nodes if node.name in some])
        return calibration.module(shuffled(model.weights, part, some), model.path)

    def off(found: Tensor, wanted: Tensor) -> bool:
        return bool((found - wanted).abs().max() > SAME_OUTPUT * wanted.abs().max())

    module = moved(orders)
    if off(computed(module), right):
        wrong = [name for name, order in orders.items() if off(computed(moved({name: order})), right)]
        what = f"with the features of {listed(wrong or orders)} shuffled the model computes something else"
        hint = f"the graph lacks a tensor that makes, scales or reads them, or has a wrong axis: {GRAPH_HINT}"
        raise Refused(Reason.ZIPIT, what, hint)
    before, after = (features(one, batch, graph.nodes, sizes) for one in (running, module))
    for node in graph.nodes:
        if off(after[node.name][:, orders[node.name]], before[node.name]):
            what = f"the features of {shown(node.name)} are not where the graph takes them"
            raise Refused(Reason.ZIPIT, what, f"name the module that they go into or come out of: {GRAPH_HINT}")


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
    """What the heads are called: as their models, with a number that makes another name where two are called alike."""
    plain = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 - a link keeps its own name
    stems = [path.name.removesuffix(".safetensors") for path in plain]
    names = [stem if stems.count(stem) == 1 else "" for stem in stems]
    for place, stem in enumerate(stems):
        if not names[place]:
            names[place] = next(name for name in (f"{stem}-{n}" for n in count(1)) if name not in names)
    return names


def _bytes(weights: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> int:
    return sum(tensor.numel() * dtypes[name].itemsize for name, tensor in weights.items())
