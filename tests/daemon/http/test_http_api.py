"""The JSON endpoints, health, metrics, and how errors are told."""

from typing import TYPE_CHECKING

import httpx
import pytest

from registry.records import Status
from tests.daemon.http.conftest import lay
from tests.registry.many import fill

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line, Readiness

PATHS = (
    "/",
    "/livez",
    "/readyz",
    "/metrics",
    "/v1/heads",
    "/v1/heads/main/latest",
    "/v1/heads/main/versions",
    "/v1/heads/main/versions/0",
    "/v1/heads/main/versions/0/data",
    "/v1/heads/main/versions/0/files/config.json",
    "/v1/experts",
    "/v1/lineage",
)


def test_head_works_wherever_get_does_and_nothing_else(client: httpx.Client) -> None:
    for path in PATHS:
        get, head = client.get(path), client.head(path)
        assert get.status_code in (200, 307), path
        assert head.status_code == get.status_code, path
        assert head.content == b"", path
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            refused = client.request(method, path)
            assert refused.status_code == 405, (method, path)
            assert "GET" in refused.headers["allow"]
            assert refused.json()["reason"] == "method_not_allowed"


def test_every_answer_carries_the_security_headers(client: httpx.Client) -> None:
    for path in (*PATHS, "/nothing", "/v1/heads/none/latest"):
        answer = client.get(path)
        assert answer.headers["x-content-type-options"] == "nosniff", path
        assert answer.headers["content-security-policy"].startswith("default-src 'none'"), path
        assert "server" not in answer.headers, path


def test_heads_name_their_live_version(line: "Line", client: httpx.Client) -> None:
    line.publish(b"one")
    main, init = client.get("/v1/heads").json()["heads"]
    assert main == {
        "name": "main",
        "method": "opcm",
        "params": {"alpha": 0.5},
        "relative_to": "base",
        "live": 1,
        "newest": 1,
        "frozen": None,
        "held": None,
        "scores": None,
        "manifest": "/v1/heads/main/versions/1",
    }
    assert init["name"] == "init"


def test_latest_redirects_and_is_not_cached(line: "Line", client: httpx.Client) -> None:
    for n in (1, 2):
        line.publish(f"weights {n}".encode())
        answer = client.get("/v1/heads/main/latest")
        assert answer.status_code == 307
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.next_request is not None
        assert answer.next_request.url.path == f"/v1/heads/main/versions/{n}"
        assert client.send(answer.next_request).json()["version"] == n


def test_versions_are_listed_newest_first(line: "Line", client: httpx.Client) -> None:
    expert = line.publish(b"one")
    line.publish(b"two")
    line.store.collected("main", 0)
    body = client.get("/v1/heads/main/versions").json()
    assert (body["head"], body["live"]) == ("main", 2)
    assert [row["version"] for row in body["versions"]] == [2, 1, 0]
    assert [row["live"] for row in body["versions"]] == [True, False, False]
    assert [row["collected"] for row in body["versions"]] == [False, False, True]
    assert body["versions"][1]["expert_id"] == expert.id
    assert body["versions"][0]["figures"] == {"lambda": 1.5}
    assert [row["version"] for row in client.get("/v1/heads/main/versions?limit=1").json()["versions"]] == [2]


def test_what_is_not_there(client: httpx.Client) -> None:
    for path, reason in {
        "/v1/heads/none/latest": "unknown_head",
        "/v1/heads/none/versions": "unknown_head",
        "/v1/heads/none/versions/0": "unknown_head",
        "/v1/heads/main/versions/7": "unknown_version",
        "/v1/heads/main/versions/seven": "unknown_version",
        "/v1/heads/main/versions/0/files/none": "unknown_file",
        "/v1/experts/" + "ab" * 32: "unknown_expert",
        "/nothing": "not_found",
        "/v1/heads/": "not_found",
    }.items():
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert answer.headers["cache-control"] == "no-cache", path
        assert set(answer.json()) == {"error", "reason", "hint"}, path
        assert answer.json()["reason"] == reason, path


def test_a_registry_that_cannot_be_read_is_told(line: "Line", client: httpx.Client) -> None:
    line.home.registry.unlink()
    answer = client.get("/v1/heads")
    assert (answer.status_code, answer.json()["reason"]) == (503, "registry")
    assert str(line.home.root) not in answer.json()["error"]
    assert client.get("/livez").status_code == 200


def test_experts_are_paged_newest_first(line: "Line", client: httpx.Client) -> None:
    for i in range(5):
        line.publish(f"weights {i}".encode(), name=f"expert-{i}.safetensors")
    seen: list[str] = []
    before = ""
    while True:
        body = client.get(f"/v1/experts?limit=2{before}").json()
        seen += [expert["name"] for expert in body["experts"]]
        if body["next_before"] is None:
            break
        before = f"&before={body['next_before']}"
    assert seen == [f"expert-{i}.safetensors" for i in (4, 3, 2, 1, 0)]


def test_experts_by_status(line: "Line", client: httpx.Client) -> None:
    line.publish(b"one")
    line.store.record(
        line.expert("bad.bin", Status.QUARANTINED, None, reason="pickle", detail="a pickle", hint="convert it")
    )
    body = client.get("/v1/experts?status=quarantined").json()
    assert [(row["name"], row["reason"], row["hint"]) for row in body["experts"]] == [
        ("bad.bin", "pickle", "convert it")
    ]
    assert len(client.get("/v1/experts").json()["experts"]) == 2
    assert "entry" not in body["experts"][0]


def test_bad_queries(client: httpx.Client) -> None:
    for query in ("after=-1", "after=x", "limit=0"):
        assert client.get(f"/v1/lineage?{query}").json()["reason"] == "bad_query"
    assert client.get("/v1/heads/main/versions?before=0").json()["reason"] == "bad_query"
    for query in ("status=lost", "limit=0", "limit=-1", "limit=x", "limit=", "before=1.5", "before=" + "9" * 40):
        answer = client.get(f"/v1/experts?{query}")
        assert (answer.status_code, answer.json()["reason"]) == (400, "bad_query"), query


def test_a_version_names_the_data_of_its_experts(line: "Line", client: httpx.Client) -> None:
    """The replay list of a trainer: in the order of merging, of the experts that this version has."""
    whole = {"uri": "s3://bucket/two.jsonl", "sha256": "0f" * 32}
    start = {"trained_head": "main", "trained_version": 0}
    line.publish(b"one", about={"data": ["hf://datasets/me/one"], "weight": 2}, **start)
    gone = line.publish(b"two", about={"data": [whole]})
    line.publish(b"three")
    line.store.restate([lay(line.home, head, 4, b"four") for head in ("main", "init")], [gone.id])
    line.store.collected("main", 2)

    def data(n: int, head: str = "main") -> list[tuple[int, list[dict[str, str | None]]]]:
        body = client.get(f"/v1/heads/{head}/versions/{n}/data").json()
        assert (body["head"], body["version"], body["next"]) == (head, n, None)
        return [(row["version"], row["data"]) for row in body["experts"]]

    one, two, three = (1, [{"uri": "hf://datasets/me/one", "sha256": None}]), (2, [whole]), (3, [])
    assert data(0) == []
    assert data(2) == data(2, "init") == [one, two], "the files of main/2 are gone, and its lineage is not"
    assert data(3) == [one, two, three]
    assert data(4) == [one, three]
    (first,) = client.get("/v1/heads/main/versions/1/data").json()["experts"]
    assert (first["trained_from"], first["weight"]) == ("main/0", 2)
    assert [row["trained_from"] for row in client.get("/v1/lineage").json()["experts"]] == ["main/0", None]
    for path, reason in (
        ("main/versions/5", "unknown_version"),
        ("main/versions/x", "unknown_version"),
        ("soup/versions/1", "unknown_head"),
    ):
        answer = client.get(f"/v1/heads/{path}/data")
        assert (answer.status_code, answer.json()["reason"]) == (404, reason)
    assert client.get("/v1/heads/main/versions/1/data?after=-1").json()["reason"] == "bad_query"


def test_an_expert_by_its_digest(line: "Line", client: httpx.Client) -> None:
    merged = line.publish(b"one", digest="abcd" + "1" * 60)
    line.store.record(line.expert("again.safetensors", Status.DUPLICATE, merged.sha256, duplicate_of=merged.id))
    line.store.record(line.expert("odd.safetensors", Status.QUARANTINED, "abcd" + "2" * 60, reason="not_finite"))
    for asked in (merged.sha256, "abcd1", "ABCD1"):
        body = client.get(f"/v1/experts/{asked}").json()
        assert (body["id"], body["status"], body["version"]) == (merged.id, "merged", 1)
        assert body["arrivals"] == [merged.id, merged.id + 1]
    assert client.get("/v1/experts/abcd2").json()["reason"] == "not_finite", "never merged, still findable"
    assert client.get("/v1/experts/abcd").status_code == 409
    assert client.get("/v1/experts/abc").json()["reason"] == "unknown_expert"
    assert client.get("/v1/experts/odd.safetensors").json()["outcome"] == "refused", "by its name"


def test_the_lineage(line: "Line", client: httpx.Client) -> None:
    for i in range(3):
        line.publish(f"weights {i}".encode(), name=f"expert-{i}")
    line.store.record(line.expert("bad.bin", Status.QUARANTINED, None, reason="pickle"))
    body = client.get("/v1/lineage").json()
    assert body["base"]["name"] == "tiny-base"
    assert [(row["version"], row["name"]) for row in body["experts"]] == [(i + 1, f"expert-{i}") for i in range(3)]


@pytest.mark.parametrize(
    ("first", "rows", "key", "wanted"),
    [
        ("/v1/lineage?limit=2", "experts", "version", [1, 2, 3, 4, 5]),
        ("/v1/lineage?limit=5", "experts", "version", [1, 2, 3, 4, 5]),
        ("/v1/lineage?after=3", "experts", "version", [4, 5]),
        ("/v1/lineage?after=0&limit=3", "experts", "version", [1, 2, 3, 4, 5]),
        ("/v1/heads/main/versions/4/data?limit=3", "experts", "version", [1, 2, 3, 4]),
        ("/v1/experts?limit=2&status=merged", "experts", "version", [5, 4, 3, 2, 1]),
        ("/v1/heads/main/versions?limit=2", "versions", "version", [5, 4, 3, 2, 1, 0]),
        ("/v1/heads/main/versions?limit=3", "versions", "version", [5, 4, 3, 2, 1, 0]),
    ],
)
def test_pages_are_followed_by_their_next(
    line: "Line", client: httpx.Client, first: str, rows: str, key: str, wanted: list[int]
) -> None:
    for i in range(5):
        line.publish(f"weights {i}".encode(), name=f"expert-{i}")
    line.store.record(line.expert("bad.bin", Status.QUARANTINED, None, reason="pickle"))
    seen: list[int] = []
    address: str | None = first
    while address:
        body = client.get(address).json()
        seen += [row[key] for row in body[rows]]
        address = body["next"]
    assert seen == wanted
    assert client.get(first.partition("?")[0]).json()["next"] is None, "a small home is one page"


def test_a_page_has_a_thousand_rows_at_the_most(line: "Line", client: httpx.Client) -> None:
    fill(line.home.registry, 1200)
    body = client.get("/v1/lineage").json()
    assert len(body["experts"]) == 1000 and body["next"] == "/v1/lineage?limit=1000&after=1000"
    assert [row["version"] for row in client.get(body["next"]).json()["experts"]] == list(range(1001, 1201))
    for address in ("/v1/lineage", "/v1/experts", "/v1/heads/main/versions"):
        body = client.get(f"{address}?limit=100000").json()
        assert len(body["versions" if "versions" in body else "experts"]) == 1000 and body["next"]


def test_health(client: httpx.Client, readiness: "Readiness") -> None:
    assert client.get("/livez").status_code == 200
    assert client.get("/readyz").json() == {"ready": True}
    readiness.why_not = "the disk is full"
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json()["error"]) == (503, "the disk is full")
    assert client.get("/livez").status_code == 200


def test_metrics_in_both_formats(client: httpx.Client) -> None:
    plain = client.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "mainstem_example_total 3.0" in plain.text
    opened = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert opened.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert opened.text.endswith("# EOF\n")
    odd = client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=x"})
    assert odd.status_code == 200
