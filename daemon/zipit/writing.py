"""The folder that zipping makes: one model, or a head for each with what they share stored once.

OUT/zipit.json                    how it was made
OUT/model.safetensors             a whole zip, beside the configuration of the first model

OUT/heads/NAME/                   a partial zip: each is a whole model that a plain loader reads
    model-00001-of-00002.safetensors    what is shared: one file with several names, where hard links are to be had
    model-00002-of-00002.safetensors    its own
    model.safetensors.index.json
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daemon.checkpoints.weight_names import INDEX, WEIGHTS
from daemon.disk import durable
from daemon.disk.out import making
from daemon.versions.companions import companions
from daemon.versions.sealing import copy_files
from daemon.versions.weight_files import METADATA, WeightFile, index_of
from projector.errors import BadValues
from projector.errors import Reason as ProjectorReason
from projector.files.header import build_header
from projector.files.tensorfile import TensorWriter
from projector.spec import TensorSpec
from projector.text import shown

RECORD = "zipit.json"
SHARED, OWN = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Dtypes = Mapping[str, torch.dtype]


@dataclass(frozen=True)
class Head:
    """A model's own part. source: where its checkpoint lies; files: what of that folder is weights, none of a file."""

    name: str
    source: Path
    files: Sequence[str]
    weights: Mapping[str, Tensor]
    dtypes: Dtypes


def write_whole(
    out: Path, first: Head, weights: Mapping[str, Tensor], dtypes: Dtypes, record: Mapping[str, Any]
) -> None:
    """A model of all the weights, and what lies beside the first one's."""
    with making(out) as folder:
        _beside(first, folder)
        _weights(folder / WEIGHTS, weights, dtypes)
        _noted(record, folder)


def write_heads(
    out: Path, heads: Sequence[Head], shared: Mapping[str, Tensor], dtypes: Dtypes, record: Mapping[str, Any]
) -> None:
    """A whole model for each head."""
    with making(out) as folder:
        places = [folder / "heads" / head.name for head in heads]
        for head, place in zip(heads, places, strict=True):
            durable.make_folder(place, public=True)
            _beside(head, place)
            if place == places[0]:
                _weights(place / SHARED, shared, dtypes)
            else:
                durable.link_or_copy(places[0] / SHARED, place / SHARED)
            _weights(place / OWN, head.weights, head.dtypes)
            parts = [
                WeightFile(SHARED, _specs(shared, dtypes)),
                WeightFile(OWN, _specs(head.weights, head.dtypes)),
            ]
            durable.write_file(place / INDEX, index_of(parts, INDEX).text)
        _noted(record, folder)


def _noted(record: Mapping[str, Any], folder: Path) -> None:
    durable.write_file(folder / RECORD, json.dumps(record, indent=2).encode() + b"\n")


def _beside(head: Head, folder: Path) -> None:
    if head.files:
        found = companions(head.source, head.files).files
        copy_files(head.source, folder, [name for name in found if name != RECORD])  # it says how the source came about


def _specs(weights: Mapping[str, Tensor], dtypes: Dtypes) -> list[TensorSpec]:
    return [TensorSpec(name, tuple(tensor.shape), dtypes[name]) for name, tensor in weights.items()]


def _weights(path: Path, weights: Mapping[str, Tensor], dtypes: Dtypes) -> None:
    specs = _specs(weights, dtypes)
    with durable.new_file(path, build_header(specs, METADATA)[1].size) as fd:
        writer = TensorWriter(fd, specs, METADATA)
        for spec in specs:
            stored = weights[spec.name].to(spec.dtype)
            if spec.floating and not stored.isfinite().all():
                raise BadValues(
                    ProjectorReason.NOT_FINITE,
                    f"{shown(spec.name)} does not fit {spec.dtype} once it is zipped",
                    "save the models in float32 or bfloat16 first",
                )
            writer.write(spec.name, stored)
