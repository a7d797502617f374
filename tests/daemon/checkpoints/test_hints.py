"""Where an expert is, in the hints about it: each has the very paths, and what it says is done here."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from daemon.checkpoints.adapter_config import ADAPTER
from daemon.checkpoints.hints import below, filled, hinting, inner
from daemon.cli.app import app
from daemon.errors import Refused
from daemon.layout import Home
from projector.text import BASE, EXPERT, FOLDER, NEW, OUT
from registry.records import Status
from tests.daemon.following import command_in, commands_in, follow, run
from tests.daemon.homes import drain, experts, make_home
from tests.models import WEIGHTS, read_weights, write_expert

Drop = Callable[[Path, dict[str, torch.Tensor]], None]


def test_words_become_paths(tmp_path: Path) -> None:
    home = Home(tmp_path / "my home")
    refused = home.quarantine(5) / "french.bin"
    assert filled(f"convert {EXPERT} {NEW} --base {BASE}; drop {OUT}", refused, home) == (
        f"convert '{refused}' '{home.inbox / 'french'}' --base '{home.base}'; drop french-2"
    )
    assert filled(f'load("{EXPERT}"), save("{OUT}.safetensors"), load("{FOLDER}")', refused, home) == (
        f'load("{refused}"), save("french-2.safetensors"), load("the folder that it came from")'
    )
    assert filled(f"{NEW} {FOLDER}", home.inbox / "a.b", home) == f"'{home.inbox / 'a.b-2'}' '{home.inbox / 'a.b'}'"
    assert filled(NEW, home.quarantine(1) / "x.tmp", home) == f"'{home.inbox / 'x.tmp-2'}'"  # which .tmp would hide
    assert filled(EXPERT, Path("/x/a\nb")) == r"'/x/a\nb'"
    assert filled("leave <that> alone", refused, home) == "leave <that> alone"


def test_what_lies_below_is_named_below() -> None:
    with pytest.raises(Refused) as caught, hinting(Path("/x/y")), below("checkpoint-500"), below("a b.bin"):
        raise Refused("pickle", "", f"convert {inner(None)}")  # type: ignore[arg-type]
    assert caught.value.hint == "convert /x/y/checkpoint-500/'a b.bin'"


def pickled(name: str) -> Drop:
    def drop(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(tensors, folder / name)
        torch.save({}, folder / "training_args.bin")

    return drop


def links(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    blob = folder.parent.parent.parent / "blob"
    save_file(tensors, blob)
    folder.mkdir()
    (folder / WEIGHTS).symlink_to(blob)


def holes(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """An expert whose last tensor is all zeros, which a copy left out."""
    folder.mkdir()
    zeros = torch.zeros(1 << 18)
    save_file({**tensors, "z.head.weight": zeros}, folder / WEIGHTS)
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, size - zeros.nbytes)
    os.truncate(folder / WEIGHTS, size)


def nested(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    (folder / "best model").mkdir(parents=True)
    save_file(tensors, folder / "best model" / WEIGHTS)


COPIED: dict[str, Drop] = {"links": links, "nested": nested, "holes": holes}
CONVERTED = {"only bin": pickled("pytorch_model.bin"), "below": pickled("checkpoint-500/model.safetensors")}
MORE = {"odd": pickled("consolidated.00.pth"), "file.safetensors": lambda path, tensors: torch.save(tensors, path)}


@pytest.mark.parametrize(
    "drops", [COPIED, CONVERTED, pytest.param(MORE, marks=pytest.mark.slow)], ids=["copied", "converted", "more"]
)
def test_followed_to_the_word_every_one_is_merged(tmp_path: Path, base: Path, drops: dict[str, Drop]) -> None:
    home = make_home(tmp_path / "a home", base, [("main", "mean", {})])
    for seed, (name, drop) in enumerate(drops.items(), start=2):
        drop(home.inbox / name, read_weights(write_expert(tmp_path / "one.safetensors", base, seed)))
    drain(home)
    refused = {expert.name: expert for expert in experts(home)}
    shown = CliRunner().invoke(app, ["show", "1", "--home", str(home.root)]).output
    assert "\nstatus " in shown and "\nkind" not in shown  # which nobody knows of what was not opened
    assert {expert.status for expert in refused.values()} == {Status.QUARANTINED}
    for expert in refused.values():
        follow(expert.hint)
    drain(home)
    merged = {expert.name for expert in experts(home) if expert.status is Status.MERGED}
    assert merged == {name.removesuffix(".safetensors") for name in drops}, experts(home)


def test_inspect_fills_in_the_path_that_it_was_given(tmp_path: Path, base: Path) -> None:
    home = make_home(tmp_path / "home", base)
    pickled("pytorch_model.bin")(tmp_path / "a folder", {})
    said = CliRunner().invoke(app, ["inspect", str(tmp_path / "a folder"), "--home", str(home.root), "--json"])
    assert command_in(json.loads(said.output)["hint"])[2:] == [str(tmp_path / "a folder"), str(home.inbox / "a folder")]


def test_one_of_several_adapters_is_saved_as_the_hint_says(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    adapted.add_adapter("french", peft.LoraConfig(r=2, target_modules=["0"]))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    plain = {
        name.replace(".base_layer", ""): tensor for name, tensor in adapted.state_dict().items() if "lora" not in name
    }
    save_file({name.removeprefix("base_model.model."): t for name, t in plain.items()}, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", [("main", "mean", {})])
    torch.nn.init.constant_(adapted.base_model.model[0].lora_B["french"].weight, 0.01)
    dropped = home.inbox / "both"
    adapted.save_pretrained(dropped)
    save_file({n: t.contiguous() for n, t in adapted.state_dict().items()}, dropped / "adapter_model.safetensors")
    for inside in (dropped / "french").iterdir():
        inside.unlink()
    (dropped / "french").rmdir()
    assert (dropped / ADAPTER).exists()
    drain(home)
    found = re.search(r"such as french: (.*), and drop \"(.*?)\"", experts(home)[-1].hint or "")
    assert found, experts(home)[-1]
    os.chdir(tmp_path)
    exec(found[1], {"model": adapted})
    (tmp_path / found[2]).rename(home.inbox / "french")
    drain(home)
    assert experts(home)[-1].status is Status.MERGED, experts(home)[-1]


@pytest.mark.parametrize("name", ["french.safetensors", "a folder"])
def test_what_cannot_be_read_is_made_readable_where_it_lies_now_and_moved_back(
    tmp_path: Path, base: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = os.open

    def guarded(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """As a process that is not root meets it."""
        if not flags & os.O_CREAT and not os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode & 0o777:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return really(path, flags, mode, dir_fd=dir_fd)

    home = make_home(tmp_path / "a home", base, [("main", "mean", {})])
    dropped = home.inbox / name
    if name.endswith(".safetensors"):
        write_expert(dropped, base, 2)
    else:
        dropped.mkdir()
        write_expert(dropped / WEIGHTS, base, 2)
    weights = dropped if dropped.is_file() else dropped / WEIGHTS
    weights.chmod(0)
    monkeypatch.setattr(os, "open", guarded)
    drain(home)
    hint = experts(home)[-1].hint or ""
    there = home.quarantine(1) / name
    assert commands_in(hint) == [f"chmod -R a+rX '{there}'", f"mainstem quarantine retry 1 --home '{home.root}'"]
    for command in commands_in(hint):
        run(command)
    drain(home)
    assert experts(home)[-1].status is Status.MERGED


def test_only_what_can_be_mended_where_it_lies_is_said_to_go_back(tmp_path: Path, base: Path) -> None:
    home = make_home(tmp_path / "home", base, [("main", "mean", {})])
    (home.inbox / "cut.safetensors").write_bytes(base.read_bytes()[:-1])
    (home.inbox / "said").mkdir()
    write_expert(home.inbox / "said" / WEIGHTS, base, 2)
    (home.inbox / "said" / "expert.json").write_text('{"wieght": 2}')
    drain(home)
    hints = {expert.name: expert.hint or "" for expert in experts(home)}
    assert "retry" not in hints["cut.safetensors"]
    there = next(home.root.glob("quarantine/*/said"))
    (there / "expert.json").write_text('{"weight": 2}')
    follow(hints["said"])
    drain(home)
    assert experts(home)[-1].status is Status.MERGED
