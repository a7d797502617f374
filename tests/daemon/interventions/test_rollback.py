"""`mainstem rollback` and `promote`: another version is live, at once, beside the daemon and without it."""

import json
import shutil
from pathlib import Path

import pytest

from daemon.home.recovery import recover
from daemon.home.verification import verify
from daemon.layout import Home
from registry.records import Status
from registry.store import Store
from tests.daemon.homes import drain, experts, latest, lineage, live, put, tree
from tests.daemon.processes import forked, running, until
from tests.models import read_weights, write_expert


def did(home: Home, *words: str) -> str:
    done = forked(*words, "--home", home.root)
    assert done.returncode == 0, done.stderr
    return done.stdout


def there(home: Home) -> dict[str, object]:
    """All files; less what a reader of the registry leaves beside it."""
    return {name: content for name, content in tree(home.root).items() if not name.endswith(("-shm", "-wal"))}


def refused(home: Home, *words: str) -> str:
    before = there(home)
    done = forked(*words, "--home", home.root)
    assert (done.returncode, done.stdout) == (1, "")
    assert there(home) == before
    return done.stderr


def head(home: Home, name: str = "main") -> tuple[int, int, bool]:
    with lineage(home) as reader:
        found = reader.head(name)
        assert found
        return found.live, found.newest, found.frozen is not None


def sound(home: Home) -> bool:
    with Store.open(home.registry) as store:
        recover(home, store, lambda *_, **__: None)
        _, found = verify(home, store, lambda _: None)
    return not found


def test_a_rollback_turns_latest_and_holds_what_comes_after(merged: Home, model: tuple[Path, list[Path]]) -> None:
    wanted = read_weights(merged.version("main", 2))
    said = did(merged, "rollback", "2", "--reason", "it forgot German")
    assert said.splitlines()[0] == "main/2 is live, main/4 is not"
    assert "folded onto main/4" in said
    assert live(merged) == 2 and live(merged, "soup") == 4
    assert (merged.versions("main") / "LATEST").read_text() == "000002\n"
    assert all(latest(merged)[name].equal(wanted[name]) for name in wanted)
    assert did(merged, "rollback", "2") == "nothing is to be done: it is so already\n"

    put(merged, write_expert(merged.root.parent / "e.safetensors", model[0], 9))
    drain(merged)
    assert head(merged) == (2, 5, True) and head(merged, "soup") == (5, 5, False)
    with lineage(merged) as reader:
        (done,) = reader.interventions()
        held = reader.version("main", 5)
    assert (done.deed, done.head, done.version, done.previous, done.why) == (
        "rollback",
        "main",
        2,
        4,
        "it forgot German",
    )
    assert held and held.held == "rolled back to main/2" and held.parent == 4
    assert "older than main/2" in refused(merged, "promote", "1")
    assert "newer than main/2" in refused(merged, "rollback", "3")
    assert did(merged, "promote", "main/3").startswith(
        "main/3 is live, main/2 is not; main/5, the newest, is still held"
    )
    assert did(merged, "promote", "5") == "main/5 is live, as what follows it will be\n"
    assert head(merged) == (5, 5, False)
    put(merged, write_expert(merged.root.parent / "f.safetensors", model[0], 10))
    drain(merged)
    assert head(merged) == (6, 6, False)
    assert sound(merged)


def test_a_dry_run_and_what_cannot_be_done_change_nothing(merged: Home) -> None:
    before = there(merged)
    assert did(merged, "rollback", "1", "--dry-run").startswith("nothing was done; it would be so:\nmain/1 is live")
    said = did(merged, "rollback", "1", "--withdraw", "--dry-run").splitlines()
    assert said[0].startswith("main: to be ") and said[-1] == "to be taken out: 2 (b), 3 (c), 4 (d)"
    assert there(merged) == before
    assert "there is no version main/9" in refused(merged, "rollback", "9")
    assert "no expert that is merged came after main/4" in refused(merged, "rollback", "4", "--withdraw")
    with Store.open(merged.registry) as store:
        store.collected("main", 1)
    assert "removed by retention" in refused(merged, "rollback", "1")


def test_beside_a_daemon_it_shows_at_once_and_who_waits_hears_of_it(merged: Home) -> None:
    with running("run", "--home", merged.root, MAINSTEM_HTTP__PORT="0") as daemon:
        daemon.wait_for(4)
        assert did(merged, "rollback", "main/3").splitlines()[0] == "main/3 is live, main/4 is not"
        assert daemon.live() == 3 and live(merged) == 3
        assert did(merged, "rollback", "3", "--head", "soup")
        assert daemon.live("soup") == 3
        assert "newer than main/3" in forked("rollback", "4", "--home", merged.root).stderr
        assert until(lambda: 'mainstem_head_version{head="main"} 3.0' in daemon.get("/metrics").text, 30)
        assert did(merged, "promote", "4").startswith("main/4 is live")
        assert daemon.live() == 4
        assert daemon.stop() == 0
    assert not merged.requests.exists()
    assert sound(merged)


@pytest.mark.parametrize("beside", [False, True])
def test_withdrawing_what_came_last_restores_what_is_kept_and_reads_no_expert(
    merged: Home, model: tuple[Path, list[Path]], tmp_path: Path, beside: bool
) -> None:
    wanted = {name: read_weights(merged.version(name, 3)) for name in ("main", "soup")}
    shutil.rmtree(merged.root / "archive")  # nothing is read of it
    (merged.root / "archive").mkdir()
    if beside:
        with running("run", "--home", merged.root, "--no-http") as daemon:
            assert until(lambda: any('"ready"' in line for line in daemon.lines), 30)
            said = did(merged, "rollback", "3", "--withdraw", "--reason", "bad labels")
            assert daemon.stop() == 0
    else:
        said = did(merged, "rollback", "3", "--withdraw", "--reason", "bad labels")
    assert said.splitlines()[-2:] == ["main/5: restored", "soup/5: restored"]
    for name, weights in wanted.items():
        assert live(merged, name) == 5
        assert all(latest(merged, name)[key].equal(weights[key]) for key in weights)
        manifest = json.loads(merged.manifest(name, 5).read_bytes())
        assert manifest["withdrawn"]["how"] == "restored" and manifest["experts"] == 3
    gone = experts(merged)[-1]
    assert (gone.status, gone.withdrawn_in, gone.blocked) == (Status.WITHDRAWN, 5, True)
    with lineage(merged) as reader:
        (done,) = reader.interventions()
    assert (done.deed, done.experts, done.version, done.why) == ("withdraw", (4,), 5, "bad labels")

    put(merged, shutil.copytree(model[1][3], tmp_path / "again"))
    drain(merged)
    came = experts(merged)[-1]
    assert (came.status, came.duplicate_of) == (Status.DUPLICATE, 4)
    assert came.detail and "taken out of the merge: it does not come back" in came.detail
    assert came.hint and "`mainstem unblock 4`" in came.hint
    did(merged, "unblock", "4")
    put(merged, shutil.copytree(model[1][3], tmp_path / "once more"))
    drain(merged)
    assert experts(merged)[-1].status is Status.MERGED and live(merged) == 6
