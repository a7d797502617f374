"""`mainstem rebuild --without`: experts are taken out again, by subtraction or by a replay."""

import json
import shutil
from pathlib import Path

import pytest

from daemon.home.recovery import recover
from daemon.home.verification import verify
from daemon.layout import Home
from registry.records import Status
from registry.store import Store
from tests.daemon.homes import assert_close, drain, experts, latest, lineage, live, make_home, put, tree
from tests.daemon.processes import forked, rebuild
from tests.daemon.rebuilds import check, killed, refused, soup, weights
from tests.models import read_weights, write_expert
from tests.oracles.rules import ema, opcm


def test_taking_an_expert_out_subtracts_where_it_can_and_replays_where_it_must(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    before = {head: latest(merged, head) for head in ("main", "soup")}
    said = rebuild(merged, "--without", "3")
    assert said.splitlines() == ["main/5: replayed", "soup/5: subtracted"]
    assert live(merged) == live(merged, "soup") == 5
    assert_close(latest(merged), opcm(*weights(model, 0, 1, 3)))
    assert_close(latest(merged, "soup"), soup(model, [0, 1, 3]))
    gone = experts(merged)[2]
    assert (gone.status, gone.version, gone.withdrawn_in) == (Status.WITHDRAWN, 3, 5)
    manifest = json.loads(merged.manifest("soup", 5).read_bytes())
    assert manifest["withdrawn"] == {"experts": [{"sha256": gone.sha256, "name": "c"}], "how": "subtracted"}
    assert (manifest["experts"], manifest["expert"]) == (3, None)
    for head, weights_before in before.items():
        kept = read_weights(merged.version(head, 4))
        assert all(kept[name].equal(weights_before[name]) for name in kept)
    check(merged)

    assert forked("unblock", "3", "--home", merged.root).returncode == 0
    put(merged, shutil.copytree(model[1][2], tmp_path / "c"))
    drain(merged)
    assert [e.status for e in experts(merged)][2:] == [Status.WITHDRAWN, Status.MERGED, Status.MERGED]
    assert live(merged) == 6
    assert_close(latest(merged), opcm(*weights(model, 0, 1, 3, 2)))
    assert_close(latest(merged, "soup"), soup(model, [0, 1, 2, 3]))
    check(merged)
    rebuild(merged, "--head", "init", "--method", "ema")
    assert_close(latest(merged, "init"), ema(*weights(model, 0, 1, 3, 2)))
    assert live(merged, "init") == 6
    check(merged)


def test_what_is_live_and_still_has_the_expert_is_told(merged: Home) -> None:
    assert forked("rollback", "soup/3", "--home", merged.root).returncode == 0
    said = rebuild(merged, "--without", "1").splitlines()
    assert said[:2] == ["main/5: replayed", "soup/5: subtracted"]
    assert said[2:] == ["soup/5 is not live (rolled back to soup/3): soup/3 still is"]
    check(merged)


def test_taking_several_out_and_then_all(merged: Home, model: tuple[Path, list[Path]]) -> None:
    rebuild(merged, "--without", "1", "--without", "c")
    assert live(merged) == 5
    assert_close(latest(merged), opcm(*weights(model, 1, 3)))
    assert_close(latest(merged, "soup"), soup(model, [1, 3]))
    check(merged)
    assert "expert 1 (a.safetensors) went with version 5 already" in refused(merged, "--without", "1")
    assert "no merged expert is called '99'" in refused(merged, "--without", "99")
    assert merged.clean.exists()  # what is refused leaves no mark of a crash
    assert rebuild(merged, "--without", "2", "--without", "4").splitlines() == ["main/6: restored", "soup/6: restored"]
    base = read_weights(model[0])
    assert live(merged) == 6
    assert_close(latest(merged), base, 0)
    assert_close(latest(merged, "soup"), base, 0)
    check(merged)


def test_a_subtraction_alone_needs_no_other_expert(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    target = Home(tmp_path / "sums")
    rebuild(merged, "--into", target.root, "--method", "mean")
    for expert_id in (1, 3, 4):
        shutil.rmtree(target.archive(expert_id))
    assert "to be subtracted" in rebuild(target, "--without", "2", "--dry-run")
    assert live(target) == 4
    rebuild(target, "--without", "2")
    assert_close(latest(target), soup(model, [0, 2, 3]))
    shutil.rmtree(merged.archive(1))
    assert "expert 1 (a.safetensors) is not in" in refused(merged, "--without", "2")


@pytest.mark.parametrize(
    "point",
    ["commit.before=kill:4", "publish.after=kill:4", "commit.after=kill:4", "commit.after=kill:2", "link.swap=kill:6"],
)
def test_a_withdrawal_that_is_killed(
    point: str, merged: Home, model: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, point, merged, "--without", "3")
    with Store.open(merged.registry) as store:
        recover(merged, store, lambda *_, **__: None)
        committed = store.counts()[Status.WITHDRAWN] == 1
    with lineage(merged) as reader:
        assert verify(merged, reader, lambda what: None)[1] == []
    assert live(merged) == (5 if committed else 4)
    if not committed:
        rebuild(merged, "--without", "3")
    assert_close(latest(merged), opcm(*weights(model, 0, 1, 3)))
    assert_close(latest(merged, "soup"), soup(model, [0, 1, 3]))
    check(merged)


@pytest.mark.parametrize("damaged", [3, 4])
def test_an_archived_expert_that_is_no_longer_what_was_merged(
    damaged: int, merged: Home, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """One that is to be subtracted, and one that is to be replayed."""
    (weights_file,) = merged.archive(damaged).glob("*/model.safetensors")
    sound = weights_file.read_bytes()
    weights_file.unlink()  # a link to the model's file
    write_expert(tmp_path / "e.safetensors", model[0], 9)
    shutil.copy(tmp_path / "e.safetensors", weights_file)
    before = merged_files(merged)
    assert "is not what was merged" in refused(merged, "--without", "3")
    assert live(merged) == 4 and merged_files(merged) == before
    weights_file.write_bytes(sound)
    rebuild(merged, "--without", "3")
    assert_close(latest(merged), opcm(*weights(model, 0, 1, 3)))
    check(merged)


def merged_files(home: Home) -> dict[str, bytes | str]:
    return tree(home.published) | tree(home.state / "heads")


def test_an_expert_that_is_no_longer_in_the_archive_is_taken_out_by_a_replay(
    merged: Home, model: tuple[Path, list[Path]]
) -> None:
    shutil.rmtree(merged.archive(3))
    assert rebuild(merged, "--without", "3").splitlines() == ["main/5: replayed", "soup/5: replayed"]
    assert_close(latest(merged, "soup"), soup(model, [0, 1, 3]))
    assert rebuild(merged, "--without", "1", "--replay").splitlines() == ["main/6: replayed", "soup/6: replayed"]
    assert_close(latest(merged, "soup"), soup(model, [1, 3]))
    check(merged)


def test_an_expert_that_outweighs_the_others_is_taken_out_by_a_replay(
    base: Path, model: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """float32 would keep only the first digits of the others."""
    home = make_home(tmp_path / "sums", base, (("main", "mean", {}),))
    for path, weight in zip(model[1][1:3], (1000.0, 1.0), strict=True):
        copy = shutil.copytree(path, tmp_path / path.name)
        (copy / "expert.json").write_text(json.dumps({"weight": weight}))
        put(home, copy)
        drain(home)
    assert rebuild(home, "--without", "1").splitlines() == ["main/3: replayed"]
    assert_close(latest(home), soup(model, [2]))
