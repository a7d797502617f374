"""Which checkpoint of a dropped folder is meant, and whether all of it has come; every hint is followed here."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from daemon.arrivals.arrival import check_arrival
from daemon.checkpoints.adapter_config import ADAPTER, ADAPTER_WEIGHTS
from daemon.checkpoints.checkpoint import open_path
from daemon.errors import BadHome, NotYet, Reason
from daemon.layout import Home
from projector.spec import Schema
from registry.records import Expert, Status
from tests.daemon.following import follow
from tests.daemon.homes import assert_close, drain, experts, latest, live, make_home, put, quick
from tests.models import WEIGHTS, read_weights, write_base, write_expert
from tests.oracles.rules import opcm

INDEX = "model.safetensors.index.json"
CHECKPOINT = "checkpoint-500"


def shard(folder: Path, weights: Path, stem: str = "model") -> None:
    """Writes a model in two shards, with their index, into a folder."""
    tensors = read_weights(weights)
    names = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    placed = {name: names[n % 2] for n, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({name: tensors[name] for name, there in placed.items() if there == file}, folder / file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


@cache
def schema() -> Schema:
    """Of the bases here."""
    with TemporaryDirectory() as folder, open_path(write_base(Path(folder, WEIGHTS), seed=1)) as base:
        return base.tensors.schema


def unwanted(path: Path) -> NotYet:
    """What is wrong with a drop before it is merged."""
    with pytest.raises(NotYet) as caught, open_path(path, follow=False) as opened:
        check_arrival(opened, schema())
    return caught.value


def wanted(path: Path) -> list[str]:
    """The files of a drop with which nothing is wrong."""
    with open_path(path, follow=False) as opened:
        check_arrival(opened, schema())
        return [file.name for file in opened.files]


def last(home: Home) -> Expert:
    return experts(home)[-1]


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return write_expert(tmp_path / "tune", base, 2)


@pytest.mark.parametrize("beside", ["shards", "one shard", "pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_two_checkpoints_in_one_folder_are_not_guessed_between(folder: Path, base: Path, beside: str) -> None:
    newer = write_expert(folder.with_name("newer.safetensors"), base, 3)
    if "shard" in beside:
        shard(folder, newer)
        if beside == "one shard":
            for name in (INDEX, "model-00002-of-00002.safetensors"):
                (folder / name).unlink()
    else:
        torch.save(read_weights(newer), folder / beside)
    error = unwanted(folder)
    assert error.reason is Reason.AMBIGUOUS and WEIGHTS in str(error)
    assert WEIGHTS in error.hint and ("mainstem convert" in error.hint) == beside.endswith(".bin")
    for name in os.listdir(folder):  # the hint, followed the one way
        if "-of-" in name or name.endswith(".bin"):
            (folder / name).rename(folder.with_name(name))
    assert wanted(folder) == [WEIGHTS]


@pytest.mark.parametrize(("whole", "shards", "older"), [(1e9, 2e9, "whole"), (2e9, 1e9, "shards"), (1e9, 1e9, "")])
def test_the_hint_says_which_names_belong_together_and_which_are_older(
    folder: Path, base: Path, whole: float, shards: float, older: str
) -> None:
    shard(folder, write_expert(folder.with_name("newer.safetensors"), base, 3))
    for path in folder.iterdir():
        written = whole if path.name == WEIGHTS else shards
        os.utime(path, (written, written))
    groups = {"whole": WEIGHTS, "shards": f"model-*-of-00002.safetensors, {INDEX}"}
    error = unwanted(folder)
    assert all(group in str(error) for group in groups.values()) and "2001-09-09 01:46:40" in str(error)
    if older:
        assert f"the older one is {groups[older]}, unless a copy gave them their times" in error.hint
    else:
        assert f"{groups['whole']} or {groups['shards']} (" in error.hint and "do not tell" in error.hint


def test_once_the_old_one_is_gone_the_new_one_is_merged(home: Home, folder: Path, base: Path, tmp_path: Path) -> None:
    newer = write_expert(tmp_path / "newer.safetensors", base, 3)
    shard(folder, newer)
    put(home, folder)
    drain(home)
    assert (last(home).status, last(home).reason) == (Status.QUARANTINED, "ambiguous")
    quarantined = home.quarantine(1) / folder.name
    (quarantined / WEIGHTS).unlink()
    put(home, quarantined)
    drain(home)
    assert last(home).status is Status.MERGED and last(home).kind == "sharded"
    assert_close(latest(home), opcm(read_weights(base), [read_weights(newer)]))


Tensors = dict[str, Tensor]

RIVALS: dict[str, Callable[[Tensors], Tensors]] = {
    "best.safetensors": lambda own: own,
    "ema_model.safetensors": lambda own: {f"module.{name}": tensor.clone() for name, tensor in own.items()},
    "model.ema.safetensors": lambda own: {f"a.{n}": tensor.clone() for n, tensor in enumerate(own.values())},
    "last-00001-of-00002.safetensors": lambda own: own,
    "norms.safetensors": lambda own: {"layers.1.norm.weight": own["layers.1.norm.weight"].clone()},
    "tuned.safetensors": lambda own: {"layers.0.up.lora_A.weight": torch.ones(2, 16)},
    "diffusion_pytorch_model.safetensors": lambda own: {"conv_in.weight": torch.ones(3, 3)},
    "adapters.safetensors": lambda own: {"any": torch.ones(3)},
}


@pytest.mark.parametrize("beside", RIVALS)
def test_another_checkpoint_by_any_name_is_not_passed_over(folder: Path, beside: str) -> None:
    save_file(RIVALS[beside](read_weights(folder)), folder / beside)
    error = unwanted(folder)
    said = beside.replace("-00001-", "-*-")
    assert error.reason is Reason.AMBIGUOUS and said in str(error) and said in error.hint and WEIGHTS in error.hint
    (folder / beside).rename(folder.with_name(beside))  # the hint, followed the one way
    assert wanted(folder) == [WEIGHTS]
    if "-of-" not in beside:  # and the other
        (folder / WEIGHTS).unlink()
        folder.with_name(beside).rename(folder / beside)
        assert wanted(folder) == [beside]


def test_what_nobody_can_read_yet_may_be_another_checkpoint(folder: Path) -> None:
    (folder / "best.safetensors").write_bytes(b"half")
    assert unwanted(folder).reason is Reason.AMBIGUOUS


@pytest.mark.parametrize("whole", ["diffusion_pytorch_model.safetensors", "merged.safetensors"])
def test_an_adapter_beside_a_model_by_any_name(folder: Path, whole: str) -> None:
    (folder / WEIGHTS).rename(folder / whole)
    save_file({"base_model.model.layers.0.up.lora_A.weight": torch.ones(2, 16)}, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    error = unwanted(folder)
    assert error.reason is Reason.AMBIGUOUS and f"{ADAPTER}, {ADAPTER_WEIGHTS} or {whole} (" in error.hint
    (folder / whole).rename(folder.with_name(whole))  # the hint, followed both ways
    assert wanted(folder) == [ADAPTER_WEIGHTS]
    folder.with_name(whole).rename(folder / whole)
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        (folder / name).unlink()
    assert wanted(folder) == [whole]


def test_what_is_no_second_checkpoint_is_left_alone(folder: Path) -> None:
    """What a Trainer pickles, an index whose shards are gone (as `save_pretrained` leaves it)."""
    for name in ("training_args.bin", "optimizer.pt", "rng_state.pth", INDEX, "tf_model.h5"):
        (folder / name).write_text("{}")
    assert wanted(folder) == [WEIGHTS]


def test_other_weights_beside_a_checkpoint_are_left_alone(folder: Path) -> None:
    """Those of other models and of processors, what by custom has the same weights, sidecars, states."""
    own = read_weights(folder)
    for name in ("consolidated", "model.fp16", "model.fp16-00001-of-00002", "optimizer", "fisher", "._model"):
        save_file(own, folder / f"{name}.safetensors")
    others = {
        "vae": {"decoder.conv.weight": torch.ones(4, 4, 3, 3)},
        "value_head": {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)},
        "policy_preprocessor": {"observation.state.mean": torch.ones(6)},
    }
    for name, tensors in others.items():
        save_file(tensors, folder / f"{name}.safetensors")
    (folder / "2_Dense").mkdir()
    save_file({"linear.weight": torch.ones(16, 16)}, folder / "2_Dense" / WEIGHTS)
    assert wanted(folder) == [WEIGHTS]


def test_shards_beside_what_mistral_calls_consolidated(folder: Path) -> None:
    shard(folder, folder)
    (folder / WEIGHTS).rename(folder / "consolidated.safetensors")
    assert len(wanted(folder)) == 2


def test_shards_that_the_index_does_not_name_are_no_model(folder: Path) -> None:
    shard(folder, folder)
    (folder / WEIGHTS).unlink()
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"old")
    assert len(wanted(folder)) == 2


def test_an_old_adapter_beside_a_pickled_one(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER).write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    save_file({"base_model.model.layers.0.up.lora_A.weight": torch.ones(2, 16)}, adapter / ADAPTER_WEIGHTS)
    assert wanted(adapter) == [ADAPTER_WEIGHTS]
    torch.save({}, adapter / "adapter_model.bin")
    assert unwanted(adapter).reason is Reason.AMBIGUOUS


def test_shards_without_their_index_are_on_their_way(folder: Path) -> None:
    shard(folder, folder)
    for name in (WEIGHTS, INDEX):
        (folder / name).unlink()
    assert unwanted(folder).reason is Reason.INCOMPLETE


def reserved(path: Path) -> None:
    """Leaves a file as a download leaves it that has reserved its space: whole by its length, never written to."""
    size = path.stat().st_size
    head = path.read_bytes()[: 1 << 14]
    with path.open("wb") as file:
        file.write(head)
        os.posix_fallocate(file.fileno(), 0, size)
        os.fsync(file.fileno())


@pytest.fixture
def hollow(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an expert of which the second half is a hole."""
    base = write_base(tmp_path / "large.safetensors", seed=1, hidden=64)
    folder = write_expert(tmp_path / "hollow", base, 2)
    reserved(folder / WEIGHTS)
    with (folder / WEIGHTS).open("rb") as file:
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) >= os.fstat(file.fileno()).st_size:
            pytest.skip("this file system does not tell where a file has holes")
    return base, folder


def test_a_file_with_holes_waits(hollow: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = hollow
    home = make_home(tmp_path / "home", base)
    put(home, folder)
    drain(home, quick(inbox={"resume_seconds": 3600}))
    assert experts(home) == [] and os.listdir(home.inbox) == ["hollow"]
    drain(home)
    assert (last(home).status, last(home).reason) == (Status.QUARANTINED, "incomplete")
    assert live(home) == 0


def test_a_whole_file_with_holes_is_merged_as_the_hint_says(hollow: tuple[Path, Path]) -> None:
    _, folder = hollow
    assert "_READY" in unwanted(folder).hint
    subprocess.run(["cp", "--sparse=never", folder / WEIGHTS, folder / "copy"], check=True)
    (folder / "copy").rename(folder.with_name("copy.safetensors"))
    assert wanted(folder.with_name("copy.safetensors")) == ["copy.safetensors"]
    (folder / "_READY").touch()
    assert wanted(folder) == [WEIGHTS]


def below(tmp_path: Path, base: Path, *numbers: int, state: Mapping[str, object] | None = None) -> Path:
    """What a Trainer leaves in its output folder: checkpoints, with their states."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "runs").mkdir()
    for number in numbers:
        folder = write_expert(out / f"checkpoint-{number}", base, number)
        torch.save({}, folder / "optimizer.pt")
        text = {"global_step": number, "max_steps": max(numbers), "best_model_checkpoint": None, **(state or {})}
        (folder / "trainer_state.json").write_text(json.dumps(text))
    return out


def test_a_trainers_only_checkpoint_is_merged_and_can_be_read_again(home: Home, base: Path, tmp_path: Path) -> None:
    out = below(tmp_path, base, 500)
    weights = read_weights(out / CHECKPOINT)
    shutil.copytree(out, tmp_path / "again")
    put(home, out)
    drain(home)
    assert last(home).status is Status.MERGED
    assert_close(latest(home), opcm(read_weights(base), [weights]))
    with open_path(home.archive(1) / "out", follow=False) as archived:
        assert archived.within == CHECKPOINT and archived.identity() == last(home).sha256
    put(home, tmp_path / "again")
    drain(home)
    assert last(home).status is Status.DUPLICATE


def test_of_several_checkpoints_the_hint_names_the_one_to_drop(home: Home, base: Path, tmp_path: Path) -> None:
    best = {"best_model_checkpoint": "/elsewhere/out/checkpoint-1000"}
    put(home, below(tmp_path, base, 500, 1000, 1500, state=best))
    drain(home)
    refused = last(home)
    assert (refused.status, refused.reason) == (Status.QUARANTINED, "no_weights")
    assert "checkpoint-500, checkpoint-1000" in str(refused.detail)
    assert "the best by its trainer_state.json: `cp -r " in str(refused.hint)
    follow(refused.hint)
    drain(home)
    assert last(home).status is Status.MERGED and last(home).name == "out"
    assert (home.archive(last(home).id) / "out" / WEIGHTS).exists()


def test_without_a_best_one_it_is_the_last(base: Path, tmp_path: Path) -> None:
    assert "the last: `cp -r <expert>/checkpoint-1500 <new>`" in unwanted(below(tmp_path, base, 500, 1500)).hint


def test_a_training_that_goes_on_is_waited_for(base: Path, tmp_path: Path) -> None:
    out = below(tmp_path, base, 500, state={"max_steps": 1500})
    error = unwanted(out)
    assert error.reason is Reason.INCOMPLETE and "step 500 of 1500" in str(error)
    assert wanted(out / CHECKPOINT) == [WEIGHTS]  # as the hint says


def test_a_model_of_its_own_comes_before_checkpoints(base: Path, tmp_path: Path) -> None:
    out = below(tmp_path, base, 500, 1000)
    shutil.copy(write_expert(tmp_path / "trained.safetensors", base, 7), out / WEIGHTS)
    with open_path(out, follow=False) as opened:
        assert opened.within is None and opened.files[0].name == WEIGHTS


def test_notes_about_the_expert_lie_beside_its_weights(base: Path, tmp_path: Path) -> None:
    out = below(tmp_path, base, 500)
    (out / "expert.json").write_text('{"weight": 2}')
    assert "expert.json" in str(unwanted(out))
    (out / "expert.json").rename(out / CHECKPOINT / "expert.json")  # as the hint says
    with open_path(out, follow=False) as opened:
        assert opened.weight == 2


def cached(tmp_path: Path, base: Path, *revisions: str) -> Path:
    """What huggingface_hub's cache holds of a repository: links to blobs."""
    repository = tmp_path / "models--org--tune"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revisions[-1])
    for seed, revision in enumerate(revisions, start=2):
        snapshot = repository / "snapshots" / revision
        snapshot.mkdir(parents=True)
        blob = repository / "blobs" / (f"{seed}" * 8)
        write_expert(blob.with_suffix(".safetensors"), base, seed).rename(blob)
        (snapshot / WEIGHTS).symlink_to(f"../../blobs/{blob.name}")
    return repository


def test_a_snapshot_of_links_is_copied_as_the_hint_says(home: Home, base: Path, tmp_path: Path) -> None:
    snapshot = cached(tmp_path, base, "a1b2") / "snapshots" / "a1b2"
    subprocess.run(["cp", "-r", snapshot, home.inbox / "links"], check=True)
    drain(home)
    assert (last(home).reason, "`cp -rL`, from where it lay" in str(last(home).hint)) == ("symlink", True)
    subprocess.run(["cp", "-rL", snapshot, home.inbox / "files"], check=True)
    drain(home)
    assert last(home).status is Status.MERGED


def test_a_whole_folder_of_the_cache_holds_one_expert(home: Home, base: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-rL", cached(tmp_path, base, "a1b2"), home.inbox / "tune"], check=True)
    drain(home)
    assert last(home).status is Status.MERGED
    with open_path(home.archive(1) / "tune", follow=False) as archived:
        assert archived.within == "snapshots/a1b2"


def test_of_several_revisions_the_hint_names_the_one_that_main_is(base: Path, tmp_path: Path) -> None:
    subprocess.run(["cp", "-rL", cached(tmp_path, base, "a1b2", "c3d4"), tmp_path / "tune"], check=True)
    assert "`cp -rL <expert>/snapshots/c3d4 <new>`" in unwanted(tmp_path / "tune").hint


@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_base_that_is_still_being_downloaded_makes_no_home(base: Path, tmp_path: Path, where: str) -> None:
    path = tmp_path / "base.safetensors"
    shutil.copy(base, path)
    note = tmp_path / "base.safetensors.aria2"
    if where == "inside":
        path = write_base(tmp_path / "base", seed=1)
        note = path / "model.safetensors.aria2"
    note.touch()
    with pytest.raises(NotYet, match="is not finished"):
        make_home(tmp_path / "home", path)
    note.unlink()
    assert make_home(tmp_path / "home", path).exists()


def test_a_base_is_no_folder_with_a_checkpoint_in_it(base: Path, tmp_path: Path) -> None:
    with pytest.raises(BadHome) as refused:
        make_home(tmp_path / "home", below(tmp_path, base, 500))
    assert CHECKPOINT in refused.value.hint
    assert make_home(tmp_path / "home", tmp_path / "out" / CHECKPOINT).exists()


def test_a_base_may_come_in_several_formats(tmp_path: Path) -> None:
    """As the hub's older models do: what the base is, a person has said."""
    path = write_base(tmp_path / "base", seed=1)
    torch.save(load_file(path / WEIGHTS), path / "pytorch_model.bin")
    assert make_home(tmp_path / "home", path).exists()
