"""Experts' views over HTTP, and `mainstem pull`, against real homes and real daemons."""

import http.client
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry
from safetensors.torch import load, load_file, save_file

from daemon.errors import DaemonError
from daemon.home.verification import verify
from daemon.http import HttpServer, create_app
from daemon.http.computing import AT_ONCE
from daemon.layout import Home
from daemon.pull.pulling import pull
from registry.reader import Reader
from tests.daemon.homes import assert_close, drain, experts, lineage, make_home, put, quick
from tests.daemon.processes import forked, running, until
from tests.models import CONFIG, WEIGHTS, read_weights, write_base, write_expert
from tests.oracles.emr import emr, emr_views

COUNT = 3


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and its experts."""
    root = tmp_path_factory.mktemp("given")
    base = write_base(root / "base", seed=1)
    return base, [write_expert(root / f"{n}.safetensors", base, seed=10 + n) for n in range(1, COUNT + 1)]


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, given: tuple[Path, list[Path]]) -> Home:
    """A home with the heads main (emr) and init (ema), over which the experts were merged one by one."""
    base, paths = given
    home = make_home(tmp_path_factory.mktemp("merged") / "home", base, (("main", "emr", {}), ("init", "ema", {})))
    for path in paths:
        shutil.copy(path, home.inbox / path.name)
        drain(home)
    return home


@contextmanager
def served(home: Home) -> Iterator[str]:
    """A server over a home; its address."""
    with (
        Reader.open(home.registry) as reader,
        HttpServer(create_app(home, reader, CollectorRegistry(), lambda: None), "127.0.0.1", 0) as (host, port),
    ):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="module")
def origin(merged: Home) -> Iterator[str]:
    with served(merged) as origin:
        yield origin


def address(version: int, expert: object, name: str = WEIGHTS, head: str = "main") -> str:
    return f"/v1/heads/{head}/versions/{version}/views/{expert}/files/{name}"


def get(url: str, **headers: str) -> httpx.Response:
    return httpx.get(url, headers=headers, trust_env=False, timeout=60)


def refusal(answer: httpx.Response) -> tuple[int, str]:
    assert answer.json()["hint"]
    return answer.status_code, answer.json()["reason"]


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_view_of_every_version_matches_the_oracle(
    version: int, origin: str, merged: Home, given: tuple[Path, list[Path]]
) -> None:
    base, paths = given
    truth = emr_views(read_weights(base), [read_weights(path) for path in paths[:version]])
    for expert, wanted in zip(experts(merged)[:version], truth, strict=True):
        assert expert.sha256
        body = get(origin + address(version, expert.sha256)).content
        assert_close(load(body), wanted)
        for same in (expert.sha256[:8], expert.sha256.upper(), expert.id):
            assert get(origin + address(version, same)).content == body


def test_the_published_weights_are_the_unified_model(merged: Home, given: tuple[Path, list[Path]]) -> None:
    base, paths = given
    assert_close(read_weights(merged.latest("main")), emr(read_weights(base), [read_weights(path) for path in paths]))


def test_a_view_says_how_long_it_is_and_that_it_has_no_ranges(origin: str) -> None:
    url = origin + address(2, 1)
    whole = get(url)
    assert whole.status_code == 200
    assert whole.headers["accept-ranges"] == "none" and whole.headers["cache-control"] == "no-cache"
    assert "etag" not in whole.headers and "repr-digest" not in whole.headers
    assert int(whole.headers["content-length"]) == len(whole.content)
    ranged = get(url, Range="bytes=0-9")
    assert (ranged.status_code, ranged.content) == (200, whole.content)
    head = httpx.head(url, trust_env=False)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


def test_a_head_that_was_added_later_has_views_and_versions_keep_those_of_experts_withdrawn_later(
    merged: Home, given: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    home = Home(shutil.copytree(merged.root, tmp_path / "home", symlinks=True))
    for words in (("--head", "later", "--method", "emr"), ("--without", "2")):
        done = forked("rebuild", "--home", home.root, *words)
        assert done.returncode == 0, done.stderr
    base, paths = given
    truth = emr_views(read_weights(base), [read_weights(path) for path in paths])
    left = emr_views(read_weights(base), [read_weights(path) for path in (paths[0], paths[2])])
    with served(home) as origin:
        for head in ("main", "later"):
            for expert in (1, 2, 3):
                found = get(origin + address(COUNT, expert, head=head))
                assert found.status_code == 200, found.text
                assert_close(load(found.content), truth[expert - 1])
            assert_close(load(get(origin + address(COUNT + 1, 3, head=head)).content), left[1])
            assert refusal(get(origin + address(COUNT + 1, 2, head=head))) == (404, "not_merged")


def test_the_files_beside_a_view_are_the_versions(origin: str) -> None:
    answer = get(origin + address(2, 1, CONFIG))
    assert answer.content == get(f"{origin}/v1/heads/main/versions/2/files/{CONFIG}").content
    assert answer.headers["etag"].startswith('"sha256:')
    assert refusal(get(origin + address(2, 1, "model-00001-of-00002.safetensors"))) == (404, "unknown_file")
    assert refusal(get(origin + address(2, 1, "vocab.txt"))) == (404, "unknown_file")


@pytest.mark.parametrize(
    ("version", "expert", "head", "wanted"),
    [
        (2, 3, "main", (404, "not_merged")),
        (0, 1, "main", (404, "not_merged")),
        (2, 99, "main", (404, "not_merged")),
        (2, 9999, "main", (404, "unknown_expert")),
        (2, "ffffffff", "main", (404, "unknown_expert")),
        (2, "..", "main", (404, "unknown_expert")),
        (99, 1, "main", (404, "unknown_version")),
        (2, 1, "init", (404, "no_views")),
        (2, 1, "nobody", (404, "unknown_head")),
    ],
)
def test_what_there_is_not_is_said_clearly(
    version: int, expert: object, head: str, wanted: tuple[int, str], origin: str
) -> None:
    url = origin + address(version, str(expert).replace(".", "%2e"), head=head)
    assert refusal(get(url)) == wanted


def test_a_view_is_asked_for_by_a_name_too(tmp_path: Path, given: tuple[Path, list[Path]]) -> None:
    """Of several that had it, the one that the version has; where it has several, the answer tells them apart."""
    base, paths = given
    home = make_home(tmp_path / "home", base, (("main", "emr", {}),))
    for path, called in zip(paths, ("legal German", "poems", "poems"), strict=True):
        folder = home.inbox / "tune"
        folder.mkdir()
        shutil.copy(path, folder / WEIGHTS)
        (folder / "expert.json").write_text(json.dumps({"name": called}))
        drain(home)
    one, two, three = experts(home)
    assert one.sha256 and two.sha256
    with served(home) as origin:
        for version, called, expert in ((1, "tune", 1), (3, "legal%20German", 1), (2, "poems", 2)):
            found = get(origin + address(version, called))
            assert found.status_code == 200 and found.content == get(origin + address(version, expert)).content
        pull(origin, tmp_path / "view", view="legal German")
        assert read_weights(tmp_path / "view").keys() == read_weights(base).keys()
        assert (tmp_path / "view" / WEIGHTS).read_bytes() == get(origin + address(3, 1)).content
        for called, several in (("poems", (two, three)), ("tune", (one, two, three))):
            answer = get(origin + address(3, called))
            assert refusal(answer) == (409, "ambiguous")
            for expert in several:
                assert f"{expert.id} ({str(expert.sha256)[:12]} tune)" in answer.json()["error"]
        assert refusal(get(origin + address(3, "legal"))) == (404, "unknown_expert")
        assert refusal(get(origin + address(1, "poems"))) == (404, "not_merged")
    for words in (("rebuild", "--without", "poems"), ("rebuild", "--without", "tune")):
        done = forked(*words, "--home", home.root)
        assert done.returncode == 1 and f"2 ({two.sha256[:12]} tune)" in done.stderr
    assert forked("rebuild", "--without", "legal German", "--dry-run", "--home", home.root).returncode == 0
    assert '"id": 1' in forked("show", "legal German", "--json", "--home", home.root).stdout


def test_a_log_of_those_with_a_name(merged: Home) -> None:
    found = forked("log", "--name", "[12].safe*", "--json", "--home", merged.root)
    assert [expert["id"] for expert in json.loads(found.stdout)] == [2, 1]
    assert "3.safetensors" not in forked("log", "--name", "[12].safe*", "--home", merged.root).stdout


def test_a_version_that_retention_removed_has_no_views_but_its_expert_has(
    tmp_path: Path, given: tuple[Path, list[Path]]
) -> None:
    base, paths = given
    home = make_home(tmp_path / "home", base, (("main", "emr", {}),))
    for path in paths:
        shutil.copy(path, home.inbox / path.name)
        drain(home, quick(retention={"versions": 1, "grace_seconds": 0}))
    assert not home.head_state("main", 1).exists()
    with served(home) as origin:
        assert refusal(get(origin + address(1, 1))) == (410, "collected")
        truth = emr_views(read_weights(base), [read_weights(path) for path in paths])
        assert_close(load(get(origin + address(3, 1)).content), truth[0])


def test_a_view_has_the_dtype_of_its_version(tmp_path: Path, given: tuple[Path, list[Path]]) -> None:
    base, paths = given
    home = make_home(tmp_path / "home", base, (("main", "emr", {}),))
    shutil.copy(paths[0], home.inbox / paths[0].name)
    drain(home, quick(publish={"dtype": "bfloat16", "shard_bytes": 4000}))
    with served(home) as origin:
        view = load(get(origin + address(1, 1)).content)
    wanted = emr_views(read_weights(base), [read_weights(paths[0])])[0]
    for name, tensor in wanted.items():
        assert view[name].dtype == (torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)
    assert_close(view, wanted, tolerance=2**-8)


def test_only_so_many_views_are_computed_at_once_and_a_client_that_leaves_makes_room(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors", seed=1, hidden=1024)  # more than sockets buffer
    home = make_home(tmp_path / "home", base, (("main", "emr", {}),))
    put(home, write_expert(tmp_path / "expert.safetensors", base, seed=2))
    drain(home)
    with served(home) as origin:
        readers = [http.client.HTTPConnection(origin.removeprefix("http://"), timeout=60) for _ in range(AT_ONCE)]
        for reader in readers:
            reader.request("GET", address(1, 1))
            assert reader.getresponse().status == 200  # and nothing more is read
        assert refusal(get(origin + address(1, 1))) == (503, "busy")
        assert get(origin + "/livez").status_code == 200
        assert httpx.head(origin + address(1, 1), trust_env=False).status_code == 200
        for reader in readers:
            reader.close()
        assert until(lambda: get(origin + address(1, 1)).status_code == 200, 30)


def test_verify_names_a_damaged_record(merged: Home, tmp_path: Path) -> None:
    home = Home(shutil.copytree(merged.root, tmp_path / "home", symlinks=True))
    with lineage(home) as reader:
        assert verify(home, reader, lambda _: None)[1] == []
        path = home.view_record("main", 2)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        (problem,) = verify(home, reader, lambda _: None)[1]
        assert "views/000002.safetensors" in problem
        path.unlink()
        (problem,) = verify(home, reader, lambda _: None)[1]
        assert "No such file" in problem
        with served(home) as origin:
            assert refusal(get(origin + address(3, 2))) == (500, "damaged")


def test_a_duplicate_and_a_refused_expert_leave_no_record(tmp_path: Path, given: tuple[Path, list[Path]]) -> None:
    base, paths = given
    home = make_home(tmp_path / "home", base, (("main", "emr", {}),))
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(paths[0], home.inbox / name)
        drain(home)
    (home.inbox / "c.safetensors").write_bytes(paths[1].read_bytes()[:-4])
    drain(home)
    assert [str(expert.status) for expert in experts(home)] == ["merged", "duplicate", "quarantined"]
    assert os.listdir(home.views("main")) == ["000001.safetensors"]
    assert not os.listdir(home.tmp)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_pull_fetches_a_view_with_what_a_loader_needs_beside_it(
    origin: str, tmp_path: Path, given: tuple[Path, list[Path]]
) -> None:
    base, paths = given
    pull(origin, tmp_path / "view", version="2", view="1")
    assert sorted(os.listdir(tmp_path / "view")) == [CONFIG, WEIGHTS]
    truth = emr_views(read_weights(base), [read_weights(path) for path in paths[:2]])
    assert_close(load_file(tmp_path / "view" / WEIGHTS), truth[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"head": "nobody"}, "no such head"),
        ({"version": "77"}, "no version main/77"),
        ({"version": "../../livez"}, "Not Found"),
        ({"version": "1", "view": "3"}, "does not have this expert"),
        ({"view": "1", "head": "init"}, "its method is ema"),
    ],
)
def test_pull_says_what_the_server_says_and_leaves_nothing(
    more: dict[str, Any], message: str, origin: str, tmp_path: Path
) -> None:
    with pytest.raises(DaemonError, match=message) as refused:
        pull(origin, tmp_path / "model", **more)
    assert refused.value.hint
    assert os.listdir(tmp_path) == []


def test_pull_touches_no_folder_that_holds_something(origin: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(DaemonError, match="is there already"):
        pull(origin, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    pull(origin, tmp_path / "empty")
    assert (tmp_path / "empty" / WEIGHTS).exists()
    assert os.listdir(tmp_path / "full") == ["mine"]


@pytest.mark.parametrize("url", ["127.0.0.1:1", "http://127.0.0.1:1", "http://[", "file:///etc/passwd"])
def test_pull_needs_a_mainstem_at_the_address(url: str, tmp_path: Path) -> None:
    with pytest.raises(DaemonError):
        pull(url, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_a_view_that_breaks_off_is_not_kept(tmp_path: Path) -> None:
    """Float16 ends at 65504. The merged weights stay below, but the first expert's view is rescaled by two."""
    base = tmp_path / "base.safetensors"
    save_file({"w": torch.ones(200, 2)}, base)
    first, second = torch.ones(200, 2), torch.ones(200, 2)
    first[0, 0] += 40000
    first[1:, :] -= 100
    second[1:, :] += 101
    home = make_home(tmp_path / "home", base, (("main", "emr", {}),))
    for name, weights in (("1.safetensors", first), ("2.safetensors", second)):
        save_file({"w": weights}, home.inbox / name)
        drain(home, quick(publish={"dtype": "float16"}, admission={"max_base_ratio": 1e6, "max_norm_ratio": 1e6}))
    with served(home) as origin:
        with pytest.raises(DaemonError, match=r"model\.safetensors"):
            pull(origin, tmp_path / "model", view="1")
        pull(origin, tmp_path / "other", view="2")
    assert not (tmp_path / "model").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base.safetensors", "home", "other"}


def test_the_daemon_serves_views_and_the_command_line_fetches_them(
    tmp_path: Path, given: tuple[Path, list[Path]]
) -> None:
    base, paths = given
    home = make_home(tmp_path / "home", base, (("main", "emr", {}),))
    with running("run", "--home", home.root, "--port", "0") as daemon:
        for n, path in enumerate(paths, start=1):
            shutil.copy(path, tmp_path / path.name)
            put(home, tmp_path / path.name)
            daemon.wait_for(n)
        sha256 = experts(home)[0].sha256
        done = forked("pull", daemon.origin, tmp_path / "view", "--view", str(sha256))
        assert done.returncode == 0, done.stderr
        assert "2 files" in done.stdout
        wrong = forked("pull", daemon.origin, tmp_path / "other", "--view", "ffffffff")
        assert wrong.returncode == 1 and "no expert has that sha256" in wrong.stderr and "hint:" in wrong.stderr
        assert daemon.stop() == 0
    truth = emr_views(read_weights(base), [read_weights(path) for path in paths])
    assert_close(load_file(tmp_path / "view" / WEIGHTS), truth[0])
