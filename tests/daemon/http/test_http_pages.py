"""The pages of experts, of versions and of the lineage; what is drawn in them, and where their links lead."""

import gzip
import html
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import httpx
import torch
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette

from daemon.config import Settings
from daemon.disk import durable
from daemon.home.condition import condition
from daemon.home.presence import Presence
from daemon.http import HttpServer, create_app
from daemon.http.pages.arrived import ROWS
from daemon.http.pages.charts import Series, chart, outliers
from daemon.http.pages.graph import Link, Node, drawn
from daemon.http.pages.ground import facts
from daemon.http.pages.lineage import LANES
from daemon.http.pages.measured import measured
from daemon.http.pages.words import DEFAULTS, said, set_params
from daemon.layout import CARD, MANIFEST, Home
from projector.methods import methods
from registry.reader import Reader
from registry.records import Deed, Head, NewEvaluation, NewIntervention, Score, Status
from tests.daemon.following import commands_in
from tests.daemon.homes import drain, experts
from tests.daemon.http.conftest import lay, sha256
from tests.daemon.processes import forked
from tests.models import read_weights, write_expert

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line


def links(page: httpx.Response) -> set[str]:
    """Where a page leads, as a browser understands it."""
    found = re.findall(r'<a [^>]*href="([^"#]*)"', page.text)
    assert not [one for one in found if one.startswith(("/", "http"))], "relative, whatever a proxy puts before it"
    return {urljoin(str(page.url), html.unescape(one)) for one in found}


def test_every_link_leads_somewhere_from_every_page(line: "Line", client: httpx.Client) -> None:
    merged = line.publish(b"one", name="french.safetensors", trained_head="init", trained_version=0)
    line.store.record(line.expert("again", Status.DUPLICATE, merged.sha256, duplicate_of=merged.id))
    line.store.record(line.expert("bad", Status.QUARANTINED, None, reason="pickle", detail="d", hint="h"))
    seen: set[str] = set()
    todo = {str(client.base_url)}
    while todo:
        page = client.get(todo.pop())
        assert page.status_code == 200, page.url
        seen.add(str(page.url))
        if page.headers["content-type"].startswith("text/html"):
            todo |= links(page) - seen - {one for one in links(page) if "/v1/" in one and "versions" not in one}
    paths = {one.removeprefix(str(client.base_url)).split("?")[0].strip("/") for one in seen}
    assert {"", "experts", "experts/1", "experts/2", "experts/3", "lineage", "heads/main/versions/1"} <= paths


def test_one_expert(line: "Line", client: httpx.Client) -> None:
    about = {"name": "French", "task": "reading", "weight": 2.0, "data": [{"uri": "s3://x"}]}
    merged = line.publish(b"one", name="french", about=about, trained_head="init", trained_version=0)
    alone = line.store.evaluate(NewEvaluation("aa" * 32, "bb" * 32, {"reading": Score(0.625)}, 1.0))
    line.store.judge_expert(merged.id, alone.id)
    text = client.get(f"/experts/{merged.id}").text
    for expected in ("<h1><bdi>french</bdi></h1>", str(merged.sha256), "reading", "0.625", "expert.json has also",
                     "mainstem rebuild --without 1 --home home", "../heads/main/versions/1", "../heads/init/versions/0",
                     'title="norm = 1.25"', "all of it as JSON"):  # fmt: skip
        assert expected in text, expected
    bad = line.store.record(line.expert("bad", Status.QUARANTINED, None, reason="pickle", detail="d<d", hint="h>h"))
    text = client.get(f"/experts/{bad.id}").text
    assert "Refused: pickle" in text and "d&lt;d" in text and "h&gt;h" in text
    for deed in ("retry", "discard"):
        assert f"mainstem quarantine {deed} {bad.id} --home home</pre>" in text
    line.store.close_case(bad.id, NewIntervention(Deed.DISCARD, "ada", experts=(bad.id,)))
    text = client.get(f"/experts/{bad.id}").text
    assert "Refused: pickle, and closed" in text and "quarantine retry" not in text
    for odd in ("99", "0", "x", "1" * 30):
        page = client.get(f"/experts/{odd}")
        assert page.status_code == 404 and "there is no such expert" in page.text


def test_a_hint_says_to_nobody_where_the_home_is_and_can_be_followed_beside_it(
    home: Home, base: Path, tmp_path: Path
) -> None:
    """A pickle that was really refused, in folders whose names a shell and JSON take for more than letters."""
    root = shutil.copytree(home.root, tmp_path / 'a "b" it\'s' / "chat's", symlinks=True)
    home = Home(root)
    torch.save(read_weights(write_expert(tmp_path / "x.safetensors", base, 2)), home.inbox / "x.bin")
    drain(home)
    (refused,) = experts(home)
    assert str(root) in (refused.hint or "").replace("'\"'\"'", "'"), "the command line says where"
    with (
        Reader.open(home.registry) as reader,
        serving(create_app(home, reader, CollectorRegistry(), lambda: None)) as at,
    ):
        pages = [at.get(f"/{page}") for page in ("", "experts", "experts/1", "v1/experts", "v1/experts/x.bin")]
        hint = at.get("/v1/experts").json()["experts"][0]["hint"]
    for page in pages:
        assert page.status_code == 200 and "convert" in page.text and tmp_path.name not in page.text, page.url
    (command,) = commands_in(hint)
    done = forked(*shlex.split(command)[1:], cwd=root.parent)
    assert done.returncode == 0, done.stderr
    drain(home)
    assert [one.status for one in experts(home)] == [Status.QUARANTINED, Status.MERGED]


@contextmanager
def serving(app: Starlette) -> Iterator[httpx.Client]:
    with (
        HttpServer(app, "127.0.0.1", 0) as (host, port),
        httpx.Client(base_url=f"http://{host}:{port}", trust_env=False, verify=False) as client,
    ):
        yield client


def test_one_version(line: "Line", client: httpx.Client) -> None:
    line.publish(b"one", name="french")
    head = line.store.heads()[0]
    folder = line.home.version("main", 2)
    row = lay(line.home, "main", 2, b"two")
    config, card = b'{"architectures": ["TinyForCausalLM"]}', b"# Card\n<script>1</script>"
    files = {"config.json": config, CARD: card, "sub/a b.json": b"{}", "model.safetensors": b"two"}
    for name, data in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    listed = [{"name": name, "size": len(data), "sha256": sha256(data)} for name, data in files.items()]
    gone = {"experts": [{"name": "<gone>", "sha256": "ff"}], "how": "subtracted"}
    raw = json.dumps({"files": listed, "experts": 7, "dtype": "float16", "withdrawn": gone}).encode()
    (folder / MANIFEST).write_bytes(raw)
    verdict = {"outcome": "held", "broken": [{"rule": "mean >= live", "why": "0.4 < 0.5"}]}
    held = replace(row, manifest_sha256=sha256(raw), verdict=verdict, held="mean >= live")
    line.store.commit(line.expert("e", Status.MERGED, "ef" * 32), [held, lay(line.home, "init", 2, b"x")])
    page = client.get("/heads/main/versions/2")
    for expected in ("experts in it</dt><dd>7", "float16", "&lt;gone&gt;", "subtracted",
                     "<code>mainstem promote main/2 --home home</code>",
                     "mean &gt;= live: 0.4 &lt; 0.5", "TinyForCausalLM.from_pretrained(&#39;main-2&#39;)",
                     sha256(b"{}"),
                     "vllm serve ./main-2 --served-model-name main", "files/sub/a%20b.json", "&lt;script&gt;1",
                     f"mainstem pull {str(client.base_url).rstrip('/')} main-2 --version main/2"):  # fmt: skip
        assert expected in page.text, expected
    assert client.get(next(one for one in links(page) if "a%20b" in one)).content == b"{}"
    line.home.manifest("init", 2).unlink()
    text = client.get("/heads/init/versions/2").text
    assert "is missing or not what was published" in text and "mainstem verify" in text and "<pre" not in text
    assert client.get("/heads/main/versions/1").text.count("model.safetensors") > 1
    assert "mainstem rollback" not in client.get("/heads/main/versions/1").text  # it is live
    assert "<code>mainstem rollback main/0 --home home</code>" in client.get("/heads/main/versions/0").text
    for odd in ("main/versions/9", "main/versions/x", "none/versions/1"):
        page = client.get(f"/heads/{odd}")
        assert page.status_code == 404 and page.headers["content-type"].startswith("text/html"), odd
    assert head.live == 1


def test_lists_have_pages_and_a_search(line: "Line", client: httpx.Client) -> None:
    refused = line.expert("", Status.QUARANTINED, None, reason="pickle", detail="d", hint="h")
    many = [line.store.record(replace(refused, name=f"bad-{n:03}")).id for n in range(ROWS + 3)]
    french = line.publish(b"one", name="f*ench", digest="abcd" * 16, about={"name": "Le Monde"})

    def found(**asked: object) -> list[int]:
        text = client.get("/experts", params={name: str(value) for name, value in asked.items()}).text
        return [int(one) for one in re.findall(r'class="name" href="\./experts/(\d+)"', text)]

    assert found() == [french.id, *many[::-1][: ROWS - 1]]
    older = next(one for one in links(client.get("/experts")) if "before" in one)
    assert f"before={many[-(ROWS - 1)]}" in older
    assert found(before=many[-(ROWS - 1)]) == many[::-1][ROWS - 1 :]
    assert found(status="merged") == found(q="f*") == found(q="ABCDab") == found(q="Le M") == [french.id]
    assert found(q=many[0]) == [many[0]] and found(q="ench") == found(q="?ench") == []
    assert found(q="bad-00") == many[:10][::-1]
    assert "write more of the name" in client.get("/experts", params={"q": "bad"}).text
    assert client.get("/experts?status=odd&before=x").status_code == 200


def test_what_it_stands_on(line: "Line") -> None:
    line.publish(b"one")
    line.publish(b"two")
    now = condition(line.home, line.store)
    said = {one.name: one for one in facts(line.home, line.store, line.store.heads(), now, Settings)}
    disk = said["disk"]
    assert " free of " in disk.text and disk.share is not None and 0 < disk.share <= 1
    versions = "3 of a head on the disk, 190 B in all; retention keeps 5, the base and what is live"
    assert said["versions"].text == versions and "up" not in said
    lock, presence = durable.lock(line.home.lock), Presence(line.home)
    presence.starts()
    presence.computes("cpu", 4_000_000_000)
    now = condition(line.home, line.store)
    said = {one.name: one for one in facts(line.home, line.store, line.store.heads(), now, Settings)}
    assert said["device"].text == "cpu" and "4.0 GB" in said["memory"].text and said["up"].text.startswith("for ")
    presence.ends()
    os.close(lock)


def test_pages_are_packed_for_who_takes_that(client: httpx.Client) -> None:
    plain = client.get("/lineage", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers and plain.headers["vary"] == "Accept-Encoding"
    with client.stream("GET", "/lineage", headers={"accept-encoding": "br, gzip;q=0.5"}) as packed:
        raw = b"".join(packed.iter_raw())
    assert packed.headers["content-encoding"] == "gzip" and len(raw) == int(packed.headers["content-length"])
    as_of = re.compile(r"<p data-part=.as-of.*?</p>")
    assert as_of.sub("", gzip.decompress(raw).decode()) == as_of.sub("", plain.text)
    assert "content-encoding" not in client.get("/lineage", headers={"accept-encoding": "gzip;q=0"}).headers


def test_the_lineage_says_what_happened(line: "Line", client: httpx.Client) -> None:
    gone = line.publish(b"one", name="french")
    line.publish(b"two", name="german", trained_head="init", trained_version=1)
    rows = [lay(line.home, head.name, 3, b"w") for head in line.store.heads()]
    line.store.restate([replace(row, totals={"experts": 1.0}) for row in rows], [gone.id])
    line.store.turn("init", 1, NewIntervention(Deed.ROLLBACK, "ada", head="init", version=1, previous=3), "worse")
    text = client.get("/lineage").text
    for expected in ("main live", "init live", 'title="worse">init rolled back', "taken out with main/3", "the base",
                     "merged again by a rebuild", "trained from init/1"):  # fmt: skip
        assert expected in text, expected
    assert text.count('class="trained"') >= 3 and text.count('class="turn lane-2"') >= 4
    assert text.count('class="expert"') == 2 and text.count('<circle class="node') == 8
    alone = client.get("/lineage?head=init").text
    assert "init/3" in alone and "main/3</a>" not in alone
    assert client.get("/lineage?head=none").status_code == 404
    assert ">main/1<" in client.get("/lineage?before=2").text and ">main/2<" not in client.get("/lineage?before=2").text


def test_what_is_drawn_is_joined_from_row_to_row() -> None:
    """A line that leaves a row below is met by one in the next: for versions that follow an older one, too."""
    parents = {5: 4, 4: 2, 3: 2, 2: 1, 1: 0, 0: None}
    nodes = [Node(lane, n, "kept", parent, f"{lane}/{n}") for lane in (0, 1) for n, parent in parents.items()]
    turns = [Link(0, 5, 1, "turn"), Link(1, 3, 2, "trained"), Link(0, 1, 5, "trained"), Link(1, 99, 3, "trained")]
    graph = drawn([5, 4, 3, 2, 1, 0], [replace(one, kind="live") for one in nodes], [5, 3], turns)
    rows = [graph.rows[n] for n in (5, 4, 3, 2, 1, 0)]
    for above, below in pairwise(rows):
        leaves = sorted((stroke.x, stroke.kind) for stroke in above.strokes if stroke.bottom == "100%")
        assert leaves == sorted((stroke.x, stroke.kind) for stroke in below.strokes if stroke.top == "0")
    assert not [one for one in rows[-1].strokes if one.bottom == "100%"], "the base is the end"
    assert [row.expert is not None for row in rows] == [True, False, True, False, False, False]
    assert all(0 < x < graph.width for row in rows for x, _ in row.nodes)
    crowd = drawn([2, 1, 0], [Node(lane, 1, "kept", 0, "") for lane in range(LANES)], [], [])
    assert crowd.width < 200, "it has room on a phone"


def test_columns_are_of_what_the_method_reports(line: "Line") -> None:
    main, init = line.store.heads()
    silent = replace(lay(line.home, "main", 1, b"w"), figures={})
    line.store.commit(line.expert("e", Status.MERGED, "ef" * 32), [silent, lay(line.home, "init", 1, b"w")])
    assert measured(line.store, [main, init]).columns == ["version", "norm", "seconds"]
    said = measured(line.store, [init, main])
    assert said.columns == ["version", "norm", "lambda", "seconds"] and said.rows[0][2] == "1.5"


def test_charts() -> None:
    points = [(n, None if n == 3 else float(n * n)) for n in range(1, 8)]
    made = chart("k", "Squares", "About.", [Series("one", points, frozenset({7})), Series("none", [(1, 2.0)])])
    assert made and (made.first, made.last, len(made.series)) == (1, 7, 1)
    line = made.series[0]
    assert line.line.count("M") == 2 and line.line.count("L") == 4 and len(line.dots) == 6
    assert [text for _, _, text in line.marks] == ["7: 49"]
    assert [text for _, text in made.ticks] == ["0", "20", "40", "60"]
    assert made.about.endswith("The latest is 49; they go from 1 to 49.")
    assert chart("k", "t", "a", [Series("one", [(1, 1.0), (2, float("nan"))])]) is None
    flat = chart("k", "t", "a", [Series("one", [(1, 0.0), (2, 0.0)])])
    assert flat and "nan" not in flat.series[0].line
    assert outliers([(n, 1.0) for n in range(9)] + [(9, 5.0)], 4) == {9} and not outliers([(1, 1.0), (2, 9.0)], 4)


def test_the_methods_own_parameters_are_those_that_are_hidden() -> None:
    ours = {name: cls for name, cls in methods().items() if cls.__module__.startswith("projector.")}
    assert {name: dict(DEFAULTS.get(name, {})) for name in ours} == {name: cls().params() for name, cls in ours.items()}
    head = Head("main", "opcm", {**DEFAULTS["opcm"], "alpha": 0.7, "exclude": ["x"]}, 0, 0)
    assert set_params(head) == "alpha 0.7, exclude set"
    assert [(one.words, one.value) for one in said({"lambda": 2.0, "odd_one": 1.0})] == [
        ("shortened by", "2"),
        ("odd one", "1"),
    ]
