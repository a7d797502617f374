"""`mainstem reload` and SIGHUP: what a running daemon takes up, what it says of the rest, and that neither a signal nor
a lost log ends it."""

import errno
import json
import os
import pty
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import httpx
import pytest
import structlog
import torch
from safetensors.torch import save_file

from daemon.arrivals.admission import check_norm
from daemon.arrivals.inbox import Drop, Inbox
from daemon.cli import main
from daemon.compute.progress import Progress
from daemon.config import LIVE, Settings, described, load, taking_effect
from daemon.errors import BadConfig, Refused
from daemon.home.supervision import Supervision
from daemon.interventions.requests import Desk
from daemon.layout import Home
from daemon.logs import configure
from daemon.merge.merger import Merger
from daemon.reloading import Stop, differences, taken_up
from daemon.service import Service
from projector.driver.head import Folded, Norms
from registry.records import Expert, Status
from registry.store import Store
from tests.daemon.following import commands_in, run
from tests.daemon.homes import experts, live, put, quick
from tests.daemon.processes import Daemon, forked, running, until
from tests.models import read_weights, write_expert

TOKENS = ("a-first-token-of-the-daemon", "a-second-token-of-the-daemon")


def said(daemon: Daemon, event: str, times: int = 1) -> list[dict[str, object]]:
    """The lines of a running daemon's log with that event, once there are so many."""

    def found() -> list[dict[str, object]]:
        lines = [json.loads(line) for line in list(daemon.lines) if line.startswith("{")]
        return [line for line in lines if line["event"] == event]

    assert until(lambda: len(found()) >= times, 60), "".join(daemon.lines)
    return found()


class Person:
    """Someone beside a running daemon, with an editor and a shell."""

    def __init__(self, home: Home, daemon: Daemon) -> None:
        self.home = home
        self.daemon = daemon

    def hang_up(self, event: str = "the settings were read again") -> dict[str, object]:
        """kill -HUP, and what the daemon says then."""
        before = len([line for line in self.daemon.lines if event in line])
        os.kill(int(self.home.lock.read_text()), signal.SIGHUP)
        return said(self.daemon, event, before + 1)[-1]

    def edit(self, text: str) -> None:
        self.home.config.write_text(text)

    def fate(self, number: int) -> Expert:
        """What became of an arrival, once it is out of the inbox."""

        def found() -> Expert | None:
            return next((one for one in experts(self.home) if one.id == number and one.place), None)

        one = until(found, 60)
        assert one, "".join(self.daemon.lines)
        return one

    def drop_again(self, refused: Expert) -> None:
        """As the hint says."""
        assert refused.hint and refused.hint.endswith(
            f"; once mainstem.toml says so, `mainstem reload --home {self.home.root}` (or restart the daemon),"
            f" then `mainstem quarantine retry {refused.id} --home {self.home.root}`"
        )
        run(commands_in(refused.hint)[-1])


@pytest.fixture(scope="module")
def person(fresh_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    home = Home(shutil.copytree(fresh_home, tmp_path_factory.mktemp("running") / "home", symlinks=True))
    with running("run", "--home", home.root, "--port", "0") as daemon:
        said(daemon, "ready")  # a signal that comes before is not heard, and there may be no lock yet
        yield Person(home, daemon)
        assert daemon.stop() == 0


def test_a_refusals_hint_is_followed_while_the_daemon_runs(person: Person, base: Path, tmp_path: Path) -> None:
    """Refused, the setting edited, SIGHUP, back into the inbox, merged: for three settings, in one run."""
    weights, home, daemon = read_weights(base), person.home, person.daemon
    for seed in (1, 2, 3):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
    said(daemon, "merged", 3)
    moved = read_weights(write_expert(tmp_path / "moved.safetensors", base, 4))
    drops: list[tuple[str, dict[str, torch.Tensor], Callable[[Expert], str]]] = [
        ("prefixed", {f"module.{name}": tensor for name, tensor in moved.items()}, advised),
        (
            "headed",
            {**read_weights(write_expert(tmp_path / "h.safetensors", base, 5)), "own.head": torch.ones(3)},
            advised,
        ),
        (
            "short",
            {n: w + 1e-5 * torch.ones_like(w) if w.is_floating_point() else w for n, w in weights.items()},
            raised,
        ),
    ]
    settings: list[str] = []
    strict = "[admission]\nlenient_names = false"
    person.edit(f"{strict}\n")
    person.hang_up()
    for place, (name, tensors, mend) in enumerate(drops):
        save_file(tensors, tmp_path / name)
        put(home, tmp_path / name, f"{name}.safetensors")
        refused = person.fate(4 + 2 * place)
        assert refused.status is Status.QUARANTINED
        settings.append(mend(refused))
        person.edit("\n".join([strict, *settings]) + "\n")
        assert person.hang_up()["changed"] == 1
        person.drop_again(refused)
        assert person.fate(5 + 2 * place).status is Status.MERGED
    assert live(home) == 6
    assert [one.reason for one in experts(home) if one.reason] == ["wrong_base", "unexpected_tensor", "norm_outlier"]


def raised(refused: Expert) -> str:
    """The limit that a hint names."""
    found = re.search(r"put (max_norm_ratio) = (\S+) under \[admission\]", refused.hint or "")
    assert found, refused.hint
    return f"{found[1]} = {found[2]}"


def advised(refused: Expert) -> str:
    """The setting that a hint names."""
    found = re.search(r"put (.*) under \[admission\] in mainstem\.toml", refused.hint or "")
    assert found, refused.hint
    return found[1]


def test_what_is_taken_up_what_needs_a_restart_and_what_is_wrong(person: Person) -> None:
    home, daemon = person.home, person.daemon
    (home.root / "token").write_text(TOKENS[0])
    (home.root / "token").chmod(0o600)
    person.edit('[http]\nwrite_token_file = "token"\n')
    person.hang_up()
    before = len(said(daemon, "a setting was changed"))
    assert upload(daemon, TOKENS[0]) == 404 and upload(daemon, TOKENS[1]) == 401

    (home.root / "token").write_text(TOKENS[1])
    person.edit(
        '[http]\nwrite_token_file = "token"\nport = 1234\n[inbox]\nscan_seconds = 4321\n[retention]\nversions = 3\n'
        '[compute]\nthreads = 3\n[heads.main.adapter]\nrank = 4\n[log]\nformat = "console"\n'
    )
    done = person.hang_up()
    assert (done["changed"], done["need_a_restart"]) == (1, 3)
    (changed,) = said(daemon, "a setting was changed")[before:]
    assert (changed["setting"], changed["before"], changed["now"]) == ("retention.versions", 5, 3)
    fixed = said(daemon, "a setting needs a restart")
    assert {line["setting"]: (line["in_force"], line["configured"]) for line in fixed} == {
        "compute.threads": (0, 3),
        "heads.main.adapter.rank": (None, 4),
        "heads.main.adapter.names": (None, "base"),
    }  # and neither http.port, which a flag says, nor inbox.scan_seconds and log.format, which the environment does
    assert upload(daemon, TOKENS[1]) == 404 and upload(daemon, TOKENS[0]) == 401
    said(daemon, "the write token was changed")

    good = figure(daemon, "success_timestamp_seconds")
    assert figure(daemon, "successful") == 1 and good > 0
    for wrong in ("[admission\n", "[retention]\nversions = 0\n", "[heads.other.adapter]\nrank = 4\n"):
        person.edit(wrong)
        problem = person.hang_up("the settings cannot be read again: those in force stay")
        assert problem["level"] == "error" and problem["error"] and problem["hint"]
        assert figure(daemon, "successful") == 0 and figure(daemon, "success_timestamp_seconds") == good
        assert upload(daemon, TOKENS[1]) == 404
    person.edit("")  # everything as it was by default; the token is gone with it
    person.hang_up()
    assert figure(daemon, "successful") == 1 and figure(daemon, "success_timestamp_seconds") > good
    assert upload(daemon, TOKENS[1]) == 403
    person.edit('[log]\nlevel = "error"\n')
    assert person.hang_up()["changed"] == 1, "who asks for less is answered all the same"
    good, lines = figure(daemon, "success_timestamp_seconds"), len(daemon.lines)
    os.kill(int(home.lock.read_text()), signal.SIGHUP)
    assert until(lambda: figure(daemon, "success_timestamp_seconds") > good, 20)
    assert len(daemon.lines) == lines
    person.edit('[log]\nlevel = "debug"\n')
    assert person.hang_up()["changed"] == 1
    assert not [token for token in TOKENS for line in daemon.lines if token in line]


def test_the_command_says_what_became_of_it(person: Person) -> None:
    home = person.home
    person.edit("[retention]\nversions = 3\n[compute]\nthreads = 3\n")
    person.hang_up()
    person.edit("[retention]\nversions = 4\n[compute]\nthreads = 3\n")
    done = forked("reload", home.root)
    assert (done.returncode, done.stdout.splitlines()[-2:]) == (  # before it, perhaps, when that will be
        0,
        [
            "taken up: retention.versions is 4, and was 3",
            "needs a restart: compute.threads is 0, and is to be 3",
        ],
    ), done.stderr
    person.edit("[retention]\nversions = 0\n")
    done = forked("reload", "--home", home.root)
    assert done.returncode == 1 and "retention.versions" in done.stderr and "hint: " in done.stderr
    person.edit("[retention]\nversions = 4\n")
    said = json.loads(forked("reload", home.root, "--json").stdout)
    assert said["told"] == ["the settings were read again: nothing has changed"] and {*said} == {
        "deed",
        "changed",
        "told",
    }


def test_where_no_daemon_runs_no_stranger_hears_of_it(home: Home) -> None:
    """After a crash the lock says which process it was, and by now that may be another one: here, this one."""
    home.lock.write_text(str(os.getpid()))
    done = forked("reload", home.root)
    assert done.returncode == 1
    assert f"no daemon runs on {home.root}" in done.stderr and "`mainstem run`" in done.stderr


def upload(daemon: Daemon, token: str) -> int:
    """The status of a commit of what was never sent: 404 to who may upload."""
    answer = httpx.post(
        f"{daemon.origin}/v1/experts/none/commit", headers={"Authorization": f"Bearer {token}"}, trust_env=False
    )
    return answer.status_code


def figure(daemon: Daemon, name: str) -> float:
    found = re.search(rf"^mainstem_config_last_reload_{name} (\S+)$", daemon.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_one_merge_has_one_set_of_settings(home: Home, base: Path, tmp_path: Path) -> None:
    """The signal comes while the first of two drops is read: it is refused by the old settings, the second, which is
    like it and was listed with it, is taken by the new ones."""
    for seed, name in ((2, "a"), (3, "b")):
        put(home, write_expert(tmp_path / f"{name}.safetensors", base, seed))
    strict, lax = quick(admission={"max_base_ratio": 1e-5}), quick()
    service: Service

    @contextmanager
    def display(drop: Drop) -> Iterator[Callable[[float], None]]:
        def show(_: float) -> None:
            if drop.name == "a.safetensors":
                os.kill(os.getpid(), signal.SIGHUP)

        yield show

    service = Service(home, strict, display, lambda: lax)
    service.run(once=True, http=False)
    assert [(one.name, one.status) for one in experts(home)] == [
        ("a.safetensors", Status.QUARANTINED),
        ("b.safetensors", Status.MERGED),
    ]


@contextmanager
def waiting(home: Home, now: Settings, wanted: Settings) -> Iterator[tuple[Service, Store, Merger, Inbox]]:
    """A service that was asked to read its settings again, as it stands between two of its steps."""
    service = Service(home, now, read=lambda: wanted)
    with Store.open(home.registry) as store:
        merger = Merger(home, store, now, Progress(service._stopping, lambda _: None))
        service._reloading.asked = True
        service._signalled.set()
        yield service, store, merger, Inbox(home.inbox, 0, time.monotonic)
        merger.close()


def test_who_waits_for_space_takes_up_that_less_is_to_be_kept(home: Home, base: Path, tmp_path: Path) -> None:
    keep, thin = quick(), quick(retention={"versions": 1, "grace_seconds": 0})
    for seed in (2, 3):
        put(home, write_expert(tmp_path / f"{seed}.safetensors", base, seed))
    Service(home, keep).run(once=True, http=False)
    with waiting(home, keep, thin) as (service, store, merger, inbox):
        desk = Desk(home, store, lambda: None, lambda _: None, lambda _: None)
        service._make_room(OSError(errno.ENOSPC, "full"), store, merger, inbox, desk, once=False)
        desk.close()
        assert service._settings.retention.versions == 1
    assert not home.version("main", 1).exists() and home.version("main", 2).exists()


def test_who_prepares_stops_for_it(home: Home) -> None:
    with waiting(home, quick(), quick()) as (service, store, merger, inbox):
        stop = service._newly_settled(store, inbox, inbox.scan())
        assert stop()
        service._reload(store, merger, inbox)
        assert not stop()


def test_what_cannot_be_put_into_force_changes_nothing(home: Home) -> None:
    """Also what shows only when the parts are put together: a token file that is not there."""
    now = quick()
    wanted = quick(admission={"max_norm_ratio": 7}, http={"write_token_file": "nowhere"})
    with waiting(home, now, wanted) as (service, store, merger, inbox), structlog.testing.capture_logs() as lines:
        service._reload(store, merger, inbox)
        assert service._settings == now and merger._settings == now
    assert [line["log_level"] for line in lines] == ["error"] and "nowhere" in lines[0]["error"]


def test_only_what_is_live_is_taken_up() -> None:
    wanted = Settings.model_validate(
        {
            "http": {"port": 1, "write_token": TOKENS[0], "upload_bytes": 5},
            "inbox": {"settle_seconds": 9, "watch": "poll"},
            "compute": {"threads": 3},
            "publish": {"dtype": "float16"},
            "retention": {"versions": 9},
            "admission": {"ignore": ["x.*"]},
            "log": {"level": "error", "format": "json"},
        }
    )
    new = taken_up(Settings(), wanted)
    changed = {name for name, _, _ in differences(Settings(), new)}
    assert changed == {
        *("http.write_token", "http.upload_bytes", "inbox.settle_seconds", "retention.versions"),
        *("admission.ignore", "log.level"),
    }
    fixed = {name for name, _, _ in differences(new, wanted)}
    assert fixed == {"http.port", "inbox.watch", "compute.threads", "publish.dtype", "log.format"}
    assert taken_up(Settings(), Settings()) == Settings()


def test_every_live_setting_is_one() -> None:
    names = [name for name, _, _ in described()]
    assert all(name in names or any(one.startswith(name.removesuffix("*")) for one in names) for name in LIVE)


def test_a_secret_that_changed_is_named_and_not_shown() -> None:
    one, other = (Settings.model_validate({"http": {"write_token": token}}) for token in TOKENS)
    ((name, before, after),) = differences(one, other)
    assert name == "http.write_token" and before == after and not {*TOKENS} & {before, after}


def test_secrets_for_the_evaluator_are_not_shown_either() -> None:
    one, other = (Settings.model_validate({"evaluate": {"environment": {"HF_TOKEN": token}}}) for token in TOKENS)
    ((name, before, after),) = differences(one, taken_up(one, other))
    assert name == "evaluate.environment" and before == after == {"HF_TOKEN": "**********"}


def test_the_hint_of_a_setting_says_how_it_takes_effect() -> None:
    then = "; once mainstem.toml says so, `mainstem reload` (or restart the daemon)"
    assert taking_effect("raise admission.max_norm_ratio", "drop it") == (
        f"raise admission.max_norm_ratio{then}, then drop it"
    )
    assert taking_effect("set http.write_token_file") == f"set http.write_token_file{then}"
    assert taking_effect("put x under [admission]").endswith(then)
    assert taking_effect("copy it again", "drop it") == "copy it again"
    assert taking_effect("set publish.dtype").endswith("; once mainstem.toml says so, restart the daemon")


def test_inspect_says_it_too(home: Home, base: Path, tmp_path: Path) -> None:
    weights = {f"module.{name}": tensor for name, tensor in read_weights(base).items()}
    save_file(weights, tmp_path / "x.safetensors")
    home.config.write_text(home.config.read_text() + "\n[admission]\nlenient_names = false\n")
    done = forked("inspect", tmp_path / "x.safetensors", "--home", home.root, "--json")
    assert json.loads(done.stdout)["hint"].endswith("`mainstem reload` (or restart the daemon), then drop it")


@pytest.mark.parametrize("norm", [60.0, 1e-3])
def test_no_hint_speaks_of_dropping_again_by_itself(norm: float) -> None:
    """The one helper says it, and where the expert lies."""
    with pytest.raises(Refused) as refused:
        check_norm(Folded(*(Norms(length, {}, {}) for length in (norm, 50.0)), ()), 1.0, Settings().admission)
    assert "again" not in refused.value.hint and taking_effect(refused.value.hint) != refused.value.hint


def test_a_file_that_was_there_and_is_gone_changes_nothing(person: Person) -> None:
    """As while an editor, or a tool that brings settings along, puts another in its place."""
    person.edit("")
    person.hang_up()
    person.home.config.unlink()
    told = person.hang_up("the settings cannot be read again: those in force stay")
    assert "mainstem.toml cannot be read: No such file" in str(told["error"]) and "put it back" in str(told["hint"])
    assert "wrong    the settings could not be read again: " in forked("status", person.home.root).stdout
    person.edit("")
    assert person.hang_up()["changed"] == 0
    assert "wrong" not in forked("status", person.home.root).stdout


def test_a_file_that_never_was_is_not_missed(tmp_path: Path) -> None:
    assert load(tmp_path / "mainstem.toml").flat() == load(None).flat()
    with pytest.raises(BadConfig, match="No such file"):
        load(tmp_path / "mainstem.toml", needed=True)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mainstem.toml"
    path.symlink_to("/proc/self/mem")  # whose first byte is an I/O error to read, also for root
    with pytest.raises(BadConfig, match=r"mainstem\.toml cannot be read"):
        load(path)


def on_a_terminal(*words: str | Path) -> tuple[int, int]:
    """(process, terminal) of the command line in a fork, as the first process of a terminal of its own."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"MAINSTEM_INBOX__SCAN_SECONDS": "0.2", "MAINSTEM_INBOX__SETTLE_SECONDS": "0"}
        torch.set_num_threads(1)
        status = 99
        try:
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            sys.argv = ["mainstem", *map(str, words)]
            main()
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 0
        finally:
            os._exit(status)
    return child, terminal


def read_until(terminal: int, word: bytes) -> bytes:
    text = b""
    while word not in text:
        text += os.read(terminal, 4096)
    return text


@pytest.mark.parametrize(
    ("verb", "ready", "heard"), [("run", b"ready", b"read again"), ("serve", b"serving", b"need a restart")]
)
def test_a_terminal_that_closes_stops_what_runs_in_it_cleanly(
    home: Home, verb: str, ready: bytes, heard: bytes
) -> None:
    child, terminal = on_a_terminal(verb, "--home", home.root, "--port", "0")
    read_until(terminal, ready)
    assert verb == "serve" or not home.clean.exists()
    os.kill(child, signal.SIGHUP)  # the terminal is there yet: that is a wish to read the settings
    read_until(terminal, heard)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert home.clean.exists()


def test_a_log_that_nobody_reads_any_more_ends_no_merge(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "x.safetensors", base, 2))
    reading, writing = os.pipe()
    os.close(reading)
    child = os.fork()
    if child == 0:
        os.dup2(writing, 2)
        status = 99
        try:
            sys.stderr = os.fdopen(2, "w")
            torch.set_num_threads(1)
            configure(quick(log={"format": "json"}).log)
            Service(home, quick()).run(once=True, http=False)
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert live(home) == 1 and home.clean.exists()


def test_a_signal_that_comes_while_an_events_lock_is_held_is_heard() -> None:
    """A handler interrupts whoever holds the lock, in the same thread: to wait for it would be for ever."""
    stop = Stop(Supervision({}))
    with stop._cond:
        stop.ask()
        assert stop.is_set()
    assert stop.wait(10) and Event.is_set(stop)
