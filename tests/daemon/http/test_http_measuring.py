"""Requests are counted by the template of their address and by status, whatever is asked."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from daemon.config import Settings
from daemon.http import create_app
from daemon.metrics import OTHER, HeadMetrics
from registry.reader import Reader
from tests.daemon.http.conftest import Line

FILE = "/v1/heads/main/versions/1/files/model.safetensors"
TEMPLATE = "/v1/heads/{head}/versions/{n}/files/{name}"


@contextmanager
def asked(line: Line, metrics: HeadMetrics, **more: object) -> Iterator[TestClient]:
    with Reader.open(line.home.registry) as reader:
        app = create_app(line.home, reader, metrics.registry, lambda: None, counting=metrics, **more)
        with TestClient(app, raise_server_exceptions=False, follow_redirects=False) as client:
            yield client


def requests(registry: CollectorRegistry) -> dict[tuple[str, str], float]:
    """By route and status."""
    return {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "mainstem_http_requests_total"
    }


def test_what_is_asked_is_counted_by_its_template(line: Line) -> None:
    line.publish(b"weights of one")
    metrics = HeadMetrics()
    with asked(line, metrics) as client:
        for path in (FILE, FILE.replace("main", "init"), FILE.replace("/1/", "/7/")):
            client.get(path)
        assert client.get(FILE, headers={"Range": "bytes=0-3"}).status_code == 206
        client.head(FILE)
        client.post(FILE)
        client.get("/v1/experts/abcdef")
        for secret in ("/secret-name", "/v1/heads/../../etc/passwd", "/%00", "/v1"):
            client.get(secret)
        client.request("SECRET", "/")
    assert requests(metrics.registry) == {
        (TEMPLATE, "200"): 3,
        (TEMPLATE, "404"): 1,
        (TEMPLATE, "206"): 1,
        (TEMPLATE, "405"): 1,
        ("/v1/experts/{sha256}", "404"): 1,
        (OTHER, "404"): 4,
        ("/", "405"): 1,
    }
    value = metrics.registry.get_sample_value
    assert value("mainstem_http_request_seconds_count", {"route": TEMPLATE}) == 6
    assert value("mainstem_http_requests_in_progress") == 0


def test_bytes_are_those_that_were_sent(line: Line) -> None:
    line.publish(b"x" * 1000)
    metrics = HeadMetrics()
    with asked(line, metrics) as client:
        assert len(client.get(FILE).content) == 1000
        assert len(client.get(FILE, headers={"Range": "bytes=100-349"}).content) == 250
        assert client.head(FILE).headers["content-length"] == "1000"
        assert metrics.registry.get_sample_value("mainstem_http_sent_bytes_total", {"route": TEMPLATE}) == 1250
        client.head("/v1/heads")  # which has a body in hand, and does not send it
        assert metrics.registry.get_sample_value("mainstem_http_sent_bytes_total", {"route": "/v1/heads"}) == 0


def test_what_fails_and_what_the_others_refuse_is_counted(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = HeadMetrics()
    monkeypatch.setattr("daemon.http.pages.routes.front", lambda *_: 1 / 0)
    with asked(line, metrics, settings=Settings) as client:
        assert client.get("/", headers={"Host": "127.0.0.1"}).status_code == 500
        assert client.get("/livez", headers={"Host": "evil.example"}).status_code == 421
    assert requests(metrics.registry) == {("/", "500"): 1, ("/livez", "421"): 1}


def test_a_prefix_of_a_proxy_changes_no_template(line: Line) -> None:
    metrics = HeadMetrics()
    with asked(
        line,
        metrics,
        settings=lambda: Settings.model_validate({"http": {"trusted_proxies": ["*"], "allowed_hosts": ["*"]}}),
    ) as client:
        assert client.get("/v1/heads", headers={"X-Forwarded-Prefix": "/models"}).status_code == 200
    assert requests(metrics.registry) == {("/v1/heads", "200"): 1}


def test_a_scrape_says_what_is_going_on_and_what_is_wrong(line: Line) -> None:
    metrics = HeadMetrics()
    with asked(line, metrics, beside=True) as client:
        line.home.inbox.rmdir()
        families = {one.name: one for one in text_string_to_metric_families(client.get("/metrics").text)}
    wrong = {sample.labels["reason"] for sample in families["mainstem_trouble"].samples if sample.value}
    assert wrong == {"no_daemon", "no_inbox"}
    doing = {sample.labels["doing"] for sample in families["mainstem_condition"].samples if sample.value}
    assert doing == {"no daemon"}


def test_a_disk_that_fails_does_not_keep_a_scrape_back(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Iterator[object]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    metrics = HeadMetrics()
    with asked(line, metrics) as client:
        monkeypatch.setattr("daemon.home.condition.os.scandir", fails)
        assert client.get("/metrics").status_code == 200
    assert metrics.registry.get_sample_value("mainstem_trouble", {"reason": "damaged"}) == 1
    assert metrics.registry.get_sample_value("mainstem_condition", {"doing": "damaged"}) == 1
