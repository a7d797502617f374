"""Which weights files a version is written in: which tensors go into which, and the index of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from huggingface_hub import split_state_dict_into_shards_factory

from daemon.checkpoints.weight_names import WeightNames
from projector.files.header import ALIGNMENT, build_header, room
from projector.spec import TensorSpec

METADATA = {"format": "pt"}  # what the stock loaders ask of a file


@dataclass(frozen=True)
class WeightFile:
    """One weights file to be written: its name and its tensors, in the dtype they are published in."""

    name: str
    specs: Sequence[TensorSpec]


@dataclass(frozen=True)
class IndexFile:
    """The index of shards, to be written: its name and its bytes."""

    name: str
    text: bytes


WeightsPlan = tuple[Sequence[WeightFile], IndexFile | None]
"""The weights files of a version, and their index where it has one."""


def plan_weights(
    specs: Iterable[TensorSpec],
    shard_bytes: int,
    names: WeightNames = WeightNames("model"),  # noqa: B008
) -> WeightsPlan:
    """How a version's weights are spread over files, of `shard_bytes` at the most, header and all; what is larger alone
    has a file of its own.
    """
    by_name = {spec.name: spec for spec in specs}
    opening = build_header((), METADATA)[1].size + ALIGNMENT
    plan = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda spec: room(spec, shard_bytes),
        filename_pattern=names.pattern,
        max_shard_size=shard_bytes - opening,
    )
    files = [
        WeightFile(name, [by_name[tensor] for tensor in tensors]) for name, tensors in plan.filename_to_tensors.items()
    ]
    return files, index_of(files, names.index) if plan.is_sharded else None


def index_of(files: Sequence[WeightFile], name: str) -> IndexFile:
    """The index of these shards."""
    total = sum(spec.nbytes for file in files for spec in file.specs)
    places = {spec.name: file.name for file in files for spec in file.specs}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    return IndexFile(name, json.dumps(index, indent=2, sort_keys=True).encode() + b"\n")
