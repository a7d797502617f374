"""What must hold of a home after any crash, once it has recovered; written once and used by every crash test.

    I1 a head's files are complete and hash-valid        I5 recovering twice equals recovering once
    I2 every expert is in the lineage once, none lost    I7 nothing temporary, no strays, disk bounded by retention
    I4 a version number never denotes two contents       I8 a refused file changes a row and its place, nothing else

I3 (what HTTP answers), I6 (the same bits as without a crash) and I9 (memory) cannot be seen on one disk: other tests
hold them. Nothing here uses the daemon's own checks, except the recovery that is under test.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from daemon.home.recovery import recover
from daemon.layout import MANIFEST, STATE_FILE, Home, number
from projector.methods import make
from projector.spec import TensorSpec
from registry.records import Expert, Head, Status, Version
from registry.store import Store

WEIGHTS = "model.safetensors"
ROOT = {"mainstem.toml", "inbox", "quarantine", "archive", "published", "state"}
STATE = {"registry.sqlite", "base", "heads", "tmp"}
History = dict[tuple[str, int], str]


def check(home: Home, dropped: Iterable[str], history: History | None = None, versions: int | None = None) -> None:
    """Recovers the home, twice, and asserts every invariant.

    dropped: the sha256 of every expert that ever came whole into the inbox, as often as it came. history: the manifests
    seen at earlier checks of this home, brought up to date here. versions: how many retention may have left per head.
    """
    once, twice = _recovered(home), _recovered(home)
    assert once == twice, f"I5: {sorted(once.items() ^ twice.items())}"
    with Store.open(home.registry) as store:
        store.check()
        lineage, experts = store.lineage(), store.experts(limit=-1)
        heads = [(head, store.versions(head.name, newest_first=False)) for head in store.heads()]
    assert set(os.listdir(home.root)) == ROOT, f"I7: {os.listdir(home.root)}"
    assert set(os.listdir(home.state)) - {"lock", "in-hand", "attempts.json", "daemon.json", "evaluations"} == STATE, (
        f"I7: {os.listdir(home.state)}"
    )
    assert not os.listdir(home.tmp), "I7: something temporary is left"
    for head, rows in heads:
        _check_head(home, head, rows, lineage, {} if history is None else history, versions)
    _check_experts(home, experts, lineage, Counter(dropped))


def tree(root: Path) -> dict[str, str]:
    """Everything under `root` by its path: a file as its sha256, a link as its target, a folder as "/"."""
    found = {}
    for folder, names, files in os.walk(root):
        for name in [*names, *files]:
            path = Path(folder, name)
            found[str(path.relative_to(root))] = (
                f"-> {path.readlink()}" if path.is_symlink() else "/" if path.is_dir() else sha256(path)
            )
    return found


def sha256(path: Path) -> str:
    """The sha256 of a file; of a folder with a model, that of its weights."""
    return hashlib.sha256((path / WEIGHTS if path.is_dir() else path).read_bytes()).hexdigest()


def files_in(folder: Path) -> set[Path]:
    """Every file in a folder and below it, relative to it."""
    return {path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()}


def _recovered(home: Home) -> dict[str, str]:
    with Store.open(home.registry) as store:
        recover(home, store, lambda *_, **__: None)
    found = tree(home.root)
    found.pop("state/lock", None)  # it holds a process id
    return found


def _check_head(
    home: Home, head: Head, rows: list[Version], lineage: list[Expert], history: History, versions: int | None
) -> None:
    assert head.newest == len(lineage), f"I2: {head} with {len(lineage)} merged experts"
    not_live = [row for row in rows if row.number > head.live]
    assert head.frozen or all(row.held for row in not_live), f"I2: {head}, and nothing holds {not_live}"
    assert [row.number for row in rows] == list(range(len(lineage) + 1)), "I4"
    assert [row.expert_id for row in rows] == [None, *(expert.id for expert in lineage)], "I2"
    kept = [row for row in rows if not row.collected]
    assert {0, head.live} <= {row.number for row in kept}, "I1"
    assert versions is None or len(kept) <= versions + 1, f"I7: {len(kept)} versions are kept"
    folders = {number(row.number) for row in kept}
    assert set(os.listdir(home.versions(head.name))) == folders | {"latest", "LATEST"}, "I7"
    records = {path.name for path in home.views(head.name).glob("*")}
    keeps = any(make(head.method, head.params).keeps(TensorSpec("weight", (2, 2), torch.float32)))
    assert records == {f"{number(n + 1)}.safetensors" for n in range(len(lineage) if keeps else 0)}, "I7"
    last = {number(n) for n in (head.newest - 1, head.newest)}  # read by the next merge, or where the last is taken out
    last.add(number(head.live))
    read = folders if keeps else folders & last
    assert set(os.listdir(home.states(head.name))) - {"views"} == read - {number(0)}, "I7"
    assert home.latest(head.name).readlink() == Path(number(head.live)), "I1"
    assert (home.versions(head.name) / "LATEST").read_text() == f"{number(head.live)}\n", "I1"
    for row in rows:
        assert history.setdefault((head.name, row.number), row.manifest_sha256) == row.manifest_sha256, "I4"
        if not row.collected:
            parent = rows[row.parent].manifest_sha256 if row.parent is not None else None
            _check_version(home, row, parent, lineage[row.number - 1].sha256 if row.number else None)


def _check_version(home: Home, row: Version, parent: str | None, expert: str | None) -> None:
    folder = home.version(row.head, row.number)
    assert sha256(home.manifest(row.head, row.number)) == row.manifest_sha256, f"I1: {folder}"
    manifest: dict[str, Any] = json.loads(home.manifest(row.head, row.number).read_bytes())
    assert (manifest["head"], manifest["version"]) == (row.head, row.number), f"I4: {folder}"
    assert (manifest["parent"] or {}).get("manifest_sha256") == parent, f"I1: {folder}"
    assert (manifest["expert"] or {}).get("sha256") == expert, f"I2: {folder}"
    listed = {folder / file["name"]: file for file in manifest["files"]}
    assert {folder / path for path in files_in(folder)} == {*listed, folder / MANIFEST}, f"I1: {folder}"
    if row.number and home.head_state(row.head, row.number).exists():  # which are there was asked above
        listed[home.head_state(row.head, row.number) / STATE_FILE] = manifest["state"]
    if manifest["record"]:
        listed[home.view_record(row.head, row.number)] = manifest["record"]
    for path, file in listed.items():
        assert (path.stat().st_size, sha256(path)) == (file["size"], file["sha256"]), f"I1: {path}"


def _check_experts(home: Home, experts: list[Expert], lineage: list[Expert], dropped: Counter[str]) -> None:
    assert max(Counter(expert.sha256 for expert in lineage).values(), default=1) == 1, "I2: merged twice"
    placed: Counter[str] = Counter()
    looked_after: set[str] = set()
    archived = {expert.id: sha256(home.archive(expert.id) / expert.name) for expert in lineage}
    for expert in experts:
        refused = expert.status is Status.QUARANTINED
        folder = home.quarantine(expert.id) if refused else home.archive(expert.id)
        assert expert.place == str(folder.relative_to(home.root)), f"I2: {expert}"
        assert (expert.version is not None) == (expert.status is Status.MERGED), f"I8: {expert}"
        files = {path.name: path for path in folder.iterdir()} if folder.exists() or not refused else {}
        if refused and not files.keys() - {"reason.json"}:  # it went back into the inbox, or was discarded
            looked_after |= set() if files else {folder.name}
            continue
        if refused:
            assert json.loads(files.pop("reason.json").read_bytes())["reason"] == expert.reason, f"I8: {expert}"
        if expert.status is Status.DUPLICATE:  # its twin's folder has the weights, once; what came besides is here
            assert expert.sha256 and expert.sha256 == archived[expert.duplicate_of], f"I2: {expert}"
            if expert.kind == "file":
                assert not files, f"I2: {expert} and {list(files)}"
            else:
                beside = {path.name for path in files.pop(expert.name).iterdir()}
                assert not files and beside and WEIGHTS not in beside, f"I2: {expert}"
            placed[expert.sha256] += 1
            continue
        assert list(files) == [expert.name], f"I2: {expert} and {list(files)}"
        found = sha256(files[expert.name])
        assert found == expert.sha256 or (refused and expert.sha256 is None), f"I2: {expert}"
        placed[found] += 1
    for name in ("archive", "quarantine"):
        places = {Path(expert.place).name for expert in experts if expert.place and expert.place.startswith(name)}
        gone = looked_after if name == "quarantine" else set()
        assert set(os.listdir(home.root / name)) == places - gone, f"I7: {name}"
    waiting = Counter(sha256(path) for path in home.inbox.iterdir())
    assert placed + waiting == dropped, f"I2: too many {placed + waiting - dropped}, lost {dropped - placed - waiting}"
    merged = {expert.sha256 for expert in lineage}
    for expert in experts:
        assert expert.status is not Status.DUPLICATE or expert.sha256 in merged, f"I2: {expert}"
