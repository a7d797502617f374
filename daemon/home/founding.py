"""Makes a home: copies the base into it, publishes it as version 0 of every head, and writes the registry last."""

import hashlib
import os
import shutil
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

from daemon.arrivals.inbox import check_finished
from daemon.checkpoints.checkpoint import OpenCheckpoint, open_path
from daemon.checkpoints.hints import hinting
from daemon.checkpoints.weight_names import WEIGHTS
from daemon.compute.resources import check_budget
from daemon.config import Compute
from daemon.disk import durable
from daemon.disk.out import in_the_way
from daemon.errors import BadHome, DaemonError
from daemon.layout import CARD, MANIFEST, Home
from daemon.manifest import FileEntry, manifest
from daemon.versions.card import Card, render
from daemon.versions.checking import entry, names_below
from daemon.versions.companions import Companions, companions
from daemon.versions.latest import point_latest
from daemon.versions.modules import check_pickled
from daemon.versions.sealing import copy_files, read_about_base, sync_folders
from projector.driver.measure import count_finite
from projector.errors import ProjectorError
from projector.lora.other_tools import recognised
from projector.method import Method
from projector.methods import make
from projector.spec import check_base
from projector.text import shown
from registry.records import BaseModel, Head, NewVersion, RelativeTo
from registry.store import Store

CONFIG_TEXT = """\
# Settings of this mainstem home. `mainstem config show` lists every one with its value; unknown keys are refused.
# Heads and their methods are not set here: they were fixed by `mainstem init` and live in the registry. What may be set
# of a head is whether its versions also hold an adapter: [heads.main.adapter] rank = 64
"""


def found(
    home: Home,
    base: Path,
    heads: Sequence[tuple[str, Method]],
    progress: Callable[[str], None],
    compute: Compute = Compute(),  # noqa: B008
    *,
    name: str | None = None,
    config: bytes | None = None,
    relative: Collection[str] = (),
    seen: Callable[[OpenCheckpoint], object] = lambda _: None,
) -> BaseModel:
    """Makes the home. Raises BadHome, BadConfig where the base's largest tensor does not fit into the memory budget,
    and BadFile or BadValues where the base is no sound checkpoint.

    name: the base's, where its path does not say it. config: the text of mainstem.toml, where there is none yet.
    relative: the heads whose task vectors are what was trained since the version that an expert names. seen: is shown
    the base, once it is known to be good and before anything is made.

    Interrupted, it leaves no registry, hence no home; the next `init` starts over.
    """
    if not base.exists():
        raise BadHome(f"the base {base} does not exist", "give --base a .safetensors file or a folder")
    check_place(home)
    _refuse_occupied(home)
    try:
        check_finished(base.resolve())
        with hinting(base), open_path(base) as checkpoint:
            if checkpoint.within:
                raise BadHome(f"it is in {checkpoint.within}", f"give --base {base / checkpoint.within}")
            theirs = recognised(checkpoint.tensors.schema)
            if checkpoint.kind == "adapter" or (theirs and all(map(theirs[0].split, checkpoint.tensors.schema))):
                raise BadHome("it is an adapter, not a model", "give --base the model that it was trained on")
            progress("checking the base")
            check_base(checkpoint.tensors.schema)
            parameters = count_finite(checkpoint.tensors)
            if not parameters:
                raise BadHome("it has no floating tensor that could be merged", "give --base the weights of a model")
            methods = [method for _, method in heads]
            seen(checkpoint)
            check_budget(checkpoint.tensors.schema, methods, compute, origin=bool(relative))
            _make_room(home)
            for folder in (home.inbox, home.root / "quarantine", home.root / "archive", home.base, home.tmp):
                durable.make_folder(folder)
            progress("copying the base")
            left_out = _copy_base(base, checkpoint, home, copies=1 + len(heads))
            if left_out:
                progress(f"left out of every version: {left_out}")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BadHome(f"the base {base}: {error.strerror}", "give --base a .safetensors file or a folder") from None
    except (DaemonError, ProjectorError) as error:
        error.args = (f"the base {base}: {error}",)
        raise
    with open_path(home.base) as checkpoint:
        named = name or shown(name_of(base.resolve()))
        record = BaseModel(named, checkpoint.identity(), parameters, checkpoint.size_bytes, datetime.now(UTC))
        dtypes = floating_dtypes(checkpoint)
    progress("publishing version 0")
    records = [new_head(name, method, relative=name in relative) for name, method in heads]
    files = base_files(home)
    versions = [publish_base(home, head, record, files, dtypes) for head in records]
    if not home.config.exists():
        durable.replace_file(home.config, config or CONFIG_TEXT.encode())
    durable.replace_file(home.clean, b"")
    unfinished = home.registry.with_name("registry.new")
    Store.create(unfinished, record, records, versions)
    durable.sync_folder(home.root)
    durable.sync_folder(home.root.parent)
    durable.rename(unfinished, home.registry)
    durable.remove(home.founding)
    return record


def new_head(name: str, method: Method, *, relative: bool) -> Head:
    """A head at version 0."""
    relative_to = RelativeTo.TRAINED_FROM if relative else RelativeTo.BASE
    return Head(name, method.name, method.params(), live=0, newest=0, relative_to=relative_to)


def floating_dtypes(base: OpenCheckpoint) -> str:
    """The dtypes of the floating tensors, in words: "bfloat16", or "bfloat16/float32"."""
    found = {str(s.dtype).removeprefix("torch.") for s in base.tensors.schema.values() if s.merged}
    return "/".join(sorted(found))


def check_place(home: Home) -> None:
    """Raises BadHome where something else than a folder is in the way of a new home."""
    if wrong := in_the_way(home.root):
        raise BadHome(f"{wrong} is no folder: no home can be made there", "choose a new or empty folder")


def _refuse_occupied(home: Home) -> None:
    """Raises BadHome where the folder holds more than a configuration, an inbox, or a home that was never finished."""
    if home.exists():
        raise BadHome(f"{home.root} is a mainstem home already", "choose another folder")
    ours = {"inbox", "lost+found", home.inner_mark.name, home.config.name, f".{home.config.name}.tmp"}
    if home.founding.exists():
        ours |= {"state", "published", "quarantine", "archive"}
    elif home.state.is_dir() and all(path.name.startswith(".") for path in home.state.iterdir()):
        ours |= {"state"}
    if home.root.exists() and (others := set(os.listdir(home.root)) - ours):
        raise BadHome(f"{home.root} is not empty: it holds {shown(min(others))}", "choose a new or empty folder")


def _make_room(home: Home) -> None:
    """Marks the home as being made, and removes what an earlier try left."""
    durable.make_folder(home.state)
    durable.replace_file(home.founding, b"")
    durable.sync_folder(home.root)
    durable.remove(home.published)
    for path in home.state.iterdir():
        if path != home.founding:
            durable.remove(path)


def _copy_base(base: Path, checkpoint: OpenCheckpoint, home: Home, copies: int) -> str:
    """copies: how many there will be, of this one too: version 0 of each head is one more. Returns what is left out of
    them, in words.
    """
    source = base.resolve()
    weights = [file.name for file in checkpoint.files]
    beside = companions(source, weights) if source.is_dir() else Companions((), ())
    check_pickled(source, beside.files)
    size = sum(file.reader.header.size for file in checkpoint.files) * copies
    size += sum((source / name).stat().st_size for name in beside.files) * copies
    free = shutil.disk_usage(home.root).free
    if size > free:
        raise BadHome(
            f"{copies} copies of it, the home's own and one for version 0 of each head, are {size} bytes, and "
            f"{home.root} has {free} free",
            "make room, or choose another disk",
        )
    if source.is_file():
        durable.copy_file(source, home.base / WEIGHTS)
        return ""
    for name in weights:
        durable.copy_file(source / name, home.base / (name if name.isprintable() else WEIGHTS))
    copy_files(source, home.base, beside.files)
    for own in (CARD, checkpoint.index):
        if own and (source / own).is_file():  # its card is not published, but the license that it names is
            durable.copy_file(source / own, home.base / own)
    return beside.said


def base_files(home: Home) -> list[FileEntry]:
    """What version 0 has of the base: all but its card."""
    return [entry(home.base / name, name) for name in names_below(home.base) if name != CARD]


def name_of(base: Path) -> str:
    """What the base is called: by its folder, or as on the hub where it lies in the hub's cache.

    >>> name_of(Path("models/gpt2")), name_of(Path("hub/models--org--gpt2/snapshots/607a30d7"))
    ('gpt2', 'org/gpt2')
    """
    kind, *repository = base.parent.parent.name.split("--", 2)
    cached = base.parent.name == "snapshots" and kind == "models" and repository
    return "/".join(repository) if cached else base.name


def publish_base(home: Home, head: Head, base: BaseModel, files: Sequence[FileEntry], dtype: str) -> NewVersion:
    """Publishes the base, whose files are those listed, as version 0 of a head; the head need not be registered."""
    folder = home.tmp / uuid4().hex
    for file in files:
        durable.make_folder((folder / file.name).parent, public=True)
        durable.copy_file(home.base / file.name, folder / file.name)  # the base stays a file that nobody else reaches
    card = Card(
        head=head.name,
        number=0,
        method=make(head.method, head.params),
        base=base,
        about=read_about_base(home.base),
        experts=0,
        newest=(),
        figures={},
        dtype=dtype,
        relative=head.relative_to is RelativeTo.TRAINED_FROM,
        files=[file.name for file in files],
    )
    durable.write_file(folder / CARD, render(card))
    files = sorted([*files, entry(folder / CARD)], key=lambda file: file.name)
    text = manifest(
        head=head,
        number=0,
        base_sha256=base.sha256,
        parent=None,
        experts=0,
        expert=None,
        figures={},
        dtype=dtype,
        created_at=base.created_at,
        files=files,
        state=None,
    )
    durable.write_file(folder / MANIFEST, text)
    durable.make_folder(home.states(head.name))
    for path in (home.published, home.versions(head.name)):
        durable.make_folder(path, public=True)
    sync_folders(folder, files)
    sync_folders(home.base, files)
    for path in (home.published, home.states(head.name).parent, home.state):
        durable.sync_folder(path)
    durable.rename(folder, home.version(head.name, 0))
    point_latest(home, head)
    return NewVersion(
        head=head.name,
        number=0,
        parent=None,
        manifest_sha256=hashlib.sha256(text).hexdigest(),
        size_bytes=base.size_bytes,
        totals={"experts": 0.0},
        figures={},
    )
