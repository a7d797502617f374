"""The first page: what it says, and that hostile names are harmless."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from daemon.home.attention import CASES
from daemon.http.pages.document import SCRIPT
from daemon.http.pages.front import TASKS
from daemon.http.pages.words import human_ago, human_count
from projector.text import size
from registry.records import LEARNED, Deed, Flag, NewEvaluation, NewIntervention, Score, Status
from tests.daemon.http.conftest import lay, sha256

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line, Readiness

HOSTILE = "<script>document.title='owned'</script>\"'><img src=x onerror=alert(1)>{{7*7}}"


def foreign(text: str) -> str:
    """A page without our own script, which is in each one once: nothing else in it may be one."""
    assert text.count(f"<script>{SCRIPT}</script>") == 1
    return text.replace(f"<script>{SCRIPT}</script>", "")


def test_an_empty_home_has_a_page(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "Nothing has arrived yet" in page.text
    assert "tiny-base" in page.text
    assert "1.5 million parameters" in page.text


def test_it_tells_what_happened(line: "Line", client: httpx.Client, readiness: "Readiness") -> None:
    merged = line.publish(b"one", name="french.safetensors")
    line.store.record(line.expert("again", Status.DUPLICATE, merged.sha256, duplicate_of=merged.id))
    line.store.record(
        line.expert("bad.bin", Status.QUARANTINED, None, reason="pickle", detail="it is a pickle", hint="convert it")
    )
    text = client.get("/").text
    for expected in ("main/1", "opcm", "ema", "french.safetensors", "pickle", "it is a pickle", "convert it",
                     f'the same bytes as <a href="./experts/{merged.id}">', "shortened by 1.5", "lambda = 1.5",
                     "no daemon runs: start `mainstem run`", "rate 0.2"):  # fmt: skip
        assert expected in text
    assert "alpha" not in text, "that is opcm's own"
    readiness.why_not = "the disk is <full>"
    text = client.get("/").text
    assert "the disk is &lt;full&gt;" in text


def test_an_odd_expert_is_marked_where_it_arrived_and_in_the_lineage(line: "Line", client: httpx.Client) -> None:
    line.publish(b"one")
    assert "pill flag" not in client.get("/").text
    odd = replace(line.expert("odd", Status.MERGED, "ef" * 32), flags=(Flag.LONG,), detail="<5> times", hint="look")
    line.store.commit(odd, [lay(line.home, head, 2, b"two") for head in ("main", "init")])
    text = client.get("/").text
    assert text.count('class="pill flag"') == 2 and "&lt;5&gt; times" in text


def test_its_commands_work(line: "Line", client: httpx.Client, tmp_path: Path) -> None:
    line.publish(b"one")
    commands = re.findall(r"<pre[^>]*>(.*?)</pre>", client.get("/").text)
    loaded = re.search(r"from_pretrained\(&#39;(.*)&#39;\)", commands[0])
    assert loaded and line.home.root.parent / loaded[1] == line.home.latest("main")
    assert commands[1] == f"mainstem pull {client.base_url} main-1 --version main/1".replace("/ main", " main")
    curl = commands[2].replace("&#39;", "'")
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    subprocess.run(curl.replace("curl ", "curl -sS --noproxy '*' "), shell=True, cwd=tmp_path, check=True, timeout=30)
    assert (tmp_path / "model.safetensors").read_bytes() == b"one"
    assert (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    "names",
    [
        ["model.safetensors"],
        ["config.json", "model.safetensors", "1_Pooling/config.json", "2_Dense/model.safetensors"],
        ["config.json", "a b$(x)'{1}[2]#1/w,é%20.json", "-o.json"],
    ],
    ids=["one", "folders", "odd"],
)
def test_what_it_says_fetches_all_files_under_their_names(
    line: "Line", client: httpx.Client, tmp_path: Path, names: list[str]
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    rows = [lay(line.home, head.name, 1, b"w") for head in line.store.heads()]
    folder = line.home.version("main", 1)
    shutil.rmtree(folder)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    listed = [{"name": name, "size": len(name.encode()), "sha256": sha256(name.encode())} for name in names]
    manifest = json.dumps({"files": [*listed, {"name": "adapter/x", "size": 0, "sha256": sha256(b"")}]}).encode()
    (folder / "manifest.json").write_bytes(manifest)
    rows[0] = replace(rows[0], manifest_sha256=sha256(manifest))
    line.store.commit(line.expert("e", Status.MERGED, "ef" * 32), rows)
    command = html.unescape(re.findall(r"<pre[^>]*>(curl.*?)</pre>", client.get("/").text)[0])
    got = tmp_path / "got"
    got.mkdir()
    pasted = command.replace("curl ", "curl -sS --noproxy '*' ", 1)
    subprocess.run(["bash", "-c", pasted], cwd=got, check=True, timeout=30)
    found = {path.relative_to(got).as_posix(): path.read_text() for path in got.rglob("*") if path.is_file()}
    assert found == {name: name for name in names}


def test_without_any_expert_left_it_says_the_base(line: "Line", client: httpx.Client) -> None:
    gone = line.publish(b"one", name="french.safetensors")
    rows = [lay(line.home, head.name, 2, b"base") for head in line.store.heads()]
    line.store.restate([replace(row, totals={"experts": 0.0}) for row in rows], [gone.id])
    text = client.get("/").text
    assert "the base again: no expert is left" in text and "None" not in text
    assert text.count("taken out with main/2") == 2, "where it arrived, and in the lineage"
    assert re.search(r"<dt><a [^>]*>taken out</a></dt><dd>1</dd>", text)


def test_nobody_is_told_where_things_lie_on_this_machine(line: "Line", client: httpx.Client) -> None:
    line.publish(b"one")
    line.store.record(line.expert("bad", Status.QUARANTINED, None, reason="bad_header", detail="it is none"))
    (line.home.version("main", 1) / "model.safetensors").unlink()
    pages = ["/", "/experts", "/experts/1", "/experts/2", "/lineage", "/heads/main/versions/1"]
    paths = [*pages, "/readyz", "/metrics", "/v1/heads", "/v1/experts", "/v1/lineage", "/v1/heads/main/versions"]
    for path in [*paths, "/v1/heads/main/versions/1", "/v1/heads/main/versions/1/files/model.safetensors"]:
        assert str(line.home.root.parent) not in client.get(path).text, path


def test_it_comes_up_on_a_damaged_home(line: "Line", client: httpx.Client, readiness: "Readiness") -> None:
    line.home.manifest("main", 0).unlink()
    readiness.why_not = "version 0 is damaged"
    page = client.get("/")
    assert page.status_code == 200
    assert "version 0 is damaged" in page.text
    assert "<pre" not in page.text


def test_hostile_names_are_text(line: "Line", client: httpx.Client) -> None:
    line.publish(b"one", name=HOSTILE)
    line.store.record(line.expert(HOSTILE, Status.QUARANTINED, None, reason="bad_header", detail=HOSTILE, hint=HOSTILE))
    for path in ("/", "/experts", "/experts/1", "/experts/2", "/lineage", "/heads/main/versions/1"):
        text = foreign(client.get(path).text)
        assert "<script" not in text
        assert "<img" not in text
        assert "{{7*7}}" in text, path
        assert "&lt;script&gt;" in text
    text = client.get("/experts", params={"q": HOSTILE}).text
    assert foreign(text).count("&lt;script&gt;") >= 5 and "<img" not in text


def test_a_hostile_host_header_stays_out(raw: Callable[..., tuple[int, bytes]]) -> None:
    for host in (b"evil';$(id)", b'"><script>', b"a b", b""):
        status, body = raw(b"/", b"Host: " + host)
        assert status in (200, 400)
        assert b"<script" not in (foreign(body.decode()).encode() if status == 200 else body)
        assert b"$(id)" not in body


def test_the_policy_allows_exactly_its_own_style(client: httpx.Client) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    style = re.findall(r"<style>(.*?)</style>", page.text, flags=re.DOTALL)
    assert len(style) == 1
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in policy
    scripts = re.findall(r"<script>(.*?)</script>", page.text, flags=re.DOTALL)
    assert len(scripts) == page.text.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "connect-src 'self';" in policy
    assert "unsafe" not in policy
    assert "style=" not in page.text
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page.text)


def test_sizes_counts_and_ages() -> None:
    assert [size(n) for n in (0, 999, 1000, 1_540_000, 250_000_000, 999_999_999, 10**12)] == [
        "0 B", "999 B", "1.0 kB", "1.5 MB", "250.0 MB", "1.0 GB", "1.0 TB",
    ]  # fmt: skip
    assert [human_count(n) for n in (12, 22_713_216, 7_000_000_000)] == ["12", "22.7 million", "7.0 billion"]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    ages = [human_ago(now - timedelta(seconds=s), now) for s in (0, 30, 90, 7200, 3 * 86400)]
    assert ages == ["just now", "30 s ago", "1 min ago", "2 h ago", "3 days ago"]


def test_a_version_that_folds_no_expert_is_not_called_the_base(line: "Line", client: httpx.Client) -> None:
    gone = line.publish(b"one", name="french.safetensors")
    line.store.restate([lay(line.home, head.name, 2, b"two") for head in line.store.heads()], [gone.id])
    graph = client.get("/").text.partition('class="graph"')[2]
    assert re.findall(r'>main/(\d)</a>\s*<(?:a|span) class="name"[^>]*>(?:<bdi>)?([^<]*)', graph) == [
        ("2", "merged again by a rebuild"),
        ("1", "french.safetensors"),
        ("0", "the base, "),
    ]


def test_what_is_held_scored_and_open_is_shown_as_text(line: "Line", client: httpx.Client) -> None:
    line.publish(b"one")
    scores = {f"task {n:02}": Score(n / 100) for n in range(TASKS)} | {HOSTILE[:90]: Score(0.5, held_out=True)}
    made = line.store.evaluate(NewEvaluation("aa" * 32, "bb" * 32, scores, 1.0))
    line.store.judge_version("main", 1, made.id)
    before = client.get("/").text
    assert "Scores of main/1" in before and "mainstem promote" not in before
    assert "&lt;script&gt;" in before and "and 1 more" in before and "task 11" not in before
    held = [replace(lay(line.home, head, 2, b"two"), held=HOSTILE) for head in ("main", "init")]
    line.store.commit(line.expert("e", Status.MERGED, "ef" * 32), held)
    bad = line.expert(HOSTILE, Status.QUARANTINED, None, reason="pickle", detail="d", hint="h")
    cases = [line.store.record(bad) for _ in range(CASES + 1)]
    line.store.close_case(cases[0].id, NewIntervention(Deed.DISCARD, "ada", experts=(cases[0].id,)))
    text = client.get("/").text
    assert text.count("<code>mainstem promote ") == 2 and "<code>mainstem promote main/2 --home home</code>" in text
    assert "main/1 · home · mainstem" in text and '<span class="pill flag" title="&lt;script' in text
    assert f"<code>mainstem quarantine discard {cases[-1].id} --home home</code>" in text
    assert f'open</dt><dd class="some">{CASES}</dd>' in text and "mainstem quarantine list" not in text
    assert f">refused in all</a></dt><dd>{CASES + 1}</dd>" in text
    assert "<script" not in foreign(text) and "<img" not in text
    line.store.turn("main", 0, NewIntervention(Deed.ROLLBACK, "ada", head="main", version=0), "rolled back to main/0")
    text = client.get("/").text
    assert "nor will the next be: rolled back to main/0" in text and ">main rolled back</span>" in text


def test_a_version_tells_all_that_keeps_it_from_being_live(line: "Line", client: httpx.Client) -> None:
    """Beside the command that makes it live, which would make another model than a learned one so."""
    line.publish(b"one")
    learned = line.home.manifest("main", 1)
    learned.write_text(json.dumps({**json.loads(learned.read_text()), "adamerging": {"steps": 1}}))
    rows = [replace(lay(line.home, "main", 2, b"two"), held="a rule"), lay(line.home, "init", 2, b"two")]
    line.store.commit(line.expert("e", Status.MERGED, "ef" * 32), rows)
    text = client.get("/heads/main/versions/2").text
    assert f"<bdi>a rule; and {LEARNED}: promoted, it is the plain sum;" in html.unescape(text)
    line.store.turn("main", 0, NewIntervention(Deed.ROLLBACK, "ada", head="main", version=0), "rolled back to main/0")
    text = client.get("/heads/main/versions/2").text
    assert "<bdi>a rule</bdi>" in text and "<bdi>rolled back to main/0</bdi>" in text


def test_the_rows_say_what_is_held_and_how_it_scored(line: "Line", client: httpx.Client) -> None:
    merged = line.publish(b"one")
    made = line.store.evaluate(NewEvaluation("aa" * 32, "bb" * 32, {"a": Score(0.25, n=8)}, 1.0))
    line.store.judge_version("main", 1, made.id)
    line.store.judge_expert(merged.id, made.id)
    score = {"score": 0.25, "higher_is_better": True, "n": 8, "stderr": None, "held_out": False}
    main, init = client.get("/v1/heads").json()["heads"]
    assert (main["scores"], main["held"], main["frozen"]) == ({"a": score}, None, None) and init["scores"] is None
    assert client.get("/v1/experts").json()["experts"][0]["scores"] == {"a": score}
    assert client.get(f"/v1/experts/{merged.sha256}").json()["scores"] == {"a": score}
    verdict = {"outcome": "held", "broken": [{"rule": "mean >= live"}], "notes": []}
    held = [replace(lay(line.home, head, 2, b"two"), held="worse", verdict=verdict) for head in ("main", "init")]
    line.store.commit(line.expert("e", Status.MERGED, "ef" * 32), held)
    line.store.pin("main", 0, True, NewIntervention(Deed.PIN, "ada", head="main", version=0))
    line.store.block([merged.id], True, NewIntervention(Deed.BLOCK, "ada", experts=(merged.id,)))
    rows = client.get("/v1/heads/main/versions").json()["versions"]
    assert [(row["held"], row["verdict"], row["scores"], row["pinned"]) for row in rows] == [
        ("worse", verdict, None, False),
        (None, None, {"a": score}, False),
        (None, None, None, True),
    ]
    stays = {"version": 2, "why": "worse", "frozen": False, "command": "mainstem promote main/2"}
    assert client.get("/v1/heads").json()["heads"][0]["held"] == stays
    blocked = client.get("/v1/lineage").json()["experts"][0]
    assert (blocked["blocked"], blocked["verdict"], blocked["closed_at"]) == (True, None, None)
