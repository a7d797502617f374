"""A version of a smile head as a folder that transformers loads: a model whose linear layers choose among its experts.

It is a folder of its own, anywhere, and no part of the home: nothing of the home is changed, and the daemon may run.
What it is made of is open from the start, so that retention may remove the version meanwhile.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.checkpoints.checkpoint import open_path
from daemon.checkpoints.weight_names import OF_A_MODEL, WeightNames
from daemon.config import Publish
from daemon.disk import durable
from daemon.disk.out import making, new_out
from daemon.errors import BadHome
from daemon.layout import CARD, STATE_FILE, Home, is_weights
from daemon.notation import called
from daemon.versions.card import RoutedCard, render_routed
from daemon.versions.checking import names_below
from daemon.versions.companions import companions
from daemon.versions.heads import totals_of
from daemon.versions.sealing import CONFIG, config_in, copy_files, read_about_base
from daemon.versions.weight_files import METADATA, plan_weights
from daemon.versions.writing import published_specs
from projector.driver.routed import RoutedModel
from projector.files.header import build_header
from projector.files.tensorfile import TensorReader, TensorWriter
from projector.methods import make
from projector.methods.smile import Smile
from projector.spec import TensorSpec
from registry.reader import Reader
from registry.records import Version

MODULE = Path(__file__).with_name("modeling_smile.py")
MODEL_TYPE = "mainstem_smile"
SHARD_BYTES = 5 << 30  # as the hub's own tools cut
AUTO_CLASSES = (
    *("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForPreTraining"),
    *("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering"),
    *("AutoModelForMultipleChoice", "AutoModelForTextEncoding", "AutoModelForImageClassification"),
    *("AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModelForSemanticSegmentation"),
    *("AutoModelForObjectDetection", "AutoModelForAudioClassification", "AutoModelForCTC"),
    "AutoModelForSpeechSeq2Seq",
)


@dataclass(frozen=True)
class Exported:
    """What was written. layers: how many have experts. experts: their names, the oldest first. evicted: how many more
    are in the weights beneath. experts_bytes: the part of `size_bytes` that the experts' own tensors take.
    """

    out: str
    version: str
    experts: Sequence[str]
    evicted: int
    layers: int
    size_bytes: int
    experts_bytes: int


def export(home: Home, reader: Reader, version: Version, out: Path, publish: Publish) -> Exported:
    """Writes the version as a folder `out`, which must not exist; it appears whole or not at all.

    Raises BadHome where the version routes nothing, or its state is gone, and BadConfig where `out` cannot be made.
    """
    name = called(version.head, version.number)
    method, totals = _method(reader, version), totals_of(version)
    if not totals.experts:
        raise BadHome(f"{name} has no expert to route to", "export a version that has: `mainstem log --versions`")
    out = new_out(out, OF_A_MODEL)
    config = _config(home.base / CONFIG)
    with ExitStack() as closing:
        base = closing.enter_context(open_path(home.base)).tensors
        model = RoutedModel(base, method, _state(home, version, closing), totals)
        if not model.layers:
            raise BadHome(
                f"{name} has no matrix that could be a layer's",
                "export a head whose `exclude` leaves some: `mainstem rebuild --head NAME=smile` adds one",
            )
        published = {spec.name: spec for spec in published_specs(base.schema, publish.dtype)}
        experts = reader.experts_in(version.number)[-len(method.places(totals)) :]
        names = [one.given_name or one.name for one in experts]
        folder = closing.enter_context(making(out))
        experts_bytes = _write(folder, model, published, publish.shard_bytes)
        beside = [one for one in companions(home.base).files if not is_weights(one) and one != CONFIG]
        copy_files(home.base, folder, beside)
        durable.copy_file(MODULE, folder / MODULE.name)
        stated = config if publish.dtype == "base" else config_in(config, publish.dtype)
        said = _with_router(stated, model, names)
        durable.write_file(folder / CONFIG, said)
        evicted, about = totals.experts - len(experts), read_about_base(home.base)
        durable.write_file(folder / CARD, render_routed(RoutedCard(name, reader.base(), about, experts, evicted)))
        size_bytes = sum((folder / one).stat().st_size for one in names_below(folder))
    return Exported(
        str(out),
        name,
        names,
        evicted,
        len(model.layers),
        size_bytes,
        experts_bytes,
    )


def _method(reader: Reader, version: Version) -> Smile:
    head = reader.head(version.head)
    if head is None:
        raise AssertionError(f"the registry has no head {version.head}")
    method = make(head.method, head.params)
    if not isinstance(method, Smile):
        raise BadHome(
            f"head {head.name} keeps no experts apart: its method is {head.method}",
            "routed models are those of a head whose method is smile: `mainstem rebuild --head smile=smile` adds one",
        )
    return method


def _config(path: Path) -> bytes:
    """The base's config.json. Raises BadHome where transformers could build no model by it."""
    hint = "routed models are built by transformers: make a home whose base is a folder as it saves them"
    try:
        text = path.read_bytes()
        kind = json.loads(text).get("model_type")
    except FileNotFoundError:
        raise BadHome("the base has no config.json", hint) from None
    except (ValueError, RecursionError, AttributeError):
        raise BadHome("the base's config.json is no JSON object", hint) from None
    if not isinstance(kind, str):
        raise BadHome("the base's config.json names no model_type", hint)
    return text


def _with_router(config: bytes, model: RoutedModel, names: Sequence[str]) -> bytes:
    """The base's config.json with what the router needs, and by whom it is to be loaded: nobody who knows no router
    shall take it for the base.
    """
    said: dict[str, Any] = json.loads(config)
    module = MODULE.stem
    auto_map = {"AutoConfig": f"{module}.RoutedConfig", **{name: f"{module}.{name}" for name in AUTO_CLASSES}}
    method = model.method
    smile = {
        "model_type": said["model_type"],
        "experts": len(names),
        "names": [*names],
        "rank": method.rank,
        "gate_rank": method.gate_rank,
        "top_k": method.top_k,
        "layers": model.layers,
    }
    whole = {**said, "model_type": MODEL_TYPE, "auto_map": auto_map, "smile": smile}
    return json.dumps(whole, indent=2).encode() + b"\n"


def _state(home: Home, version: Version, closing: ExitStack) -> TensorReader:
    path = home.head_state(version.head, version.number) / STATE_FILE
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadHome(
            f"the state of {called(version.head, version.number)} is gone",
            f"export {version.head}, the live version; `mainstem pin` keeps the state of one for later",
        ) from None
    closing.callback(os.close, fd)
    return TensorReader(fd)


def _write(folder: Path, model: RoutedModel, published: Mapping[str, TensorSpec], shard_bytes: int) -> int:
    """The weights and their index; returns how many bytes the experts' own tensors take."""
    specs = model.specs(published)
    files, index = plan_weights(specs.values(), shard_bytes or SHARD_BYTES, WeightNames("model"))
    with ExitStack() as closing:
        writers: dict[str, TensorWriter] = {}
        for file in files:
            size = build_header(file.specs, METADATA)[1].size
            fd = closing.enter_context(durable.new_file(folder / file.name, size))
            writers |= dict.fromkeys((spec.name for spec in file.specs), TensorWriter(fd, file.specs, METADATA))
        for name, start, rows in model.tensors(published):
            writers[name].put(name, rows, start)
    if index is not None:
        durable.write_file(folder / index.name, index.text)
    return sum(spec.nbytes for name, spec in specs.items() if name not in published)
