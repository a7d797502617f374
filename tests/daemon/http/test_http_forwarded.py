"""Behind a proxy: its word on the address is believed where it is trusted, and never on the name we are asked by."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import httpx
import pytest
from prometheus_client import CollectorRegistry

from daemon.config import Settings, load
from daemon.errors import BadConfig
from daemon.http import HttpServer, create_app
from registry.reader import Reader

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

TOLD = {"X-Forwarded-Proto": "https", "X-Forwarded-Prefix": "/llm/", "X-Forwarded-For": "192.0.2.9"}
PUBLIC = "https://localhost/llm"


@contextmanager
def behind(line: "Line", proxies: tuple[str, ...]) -> Iterator[httpx.Client]:
    """A client that asks as a proxy on this machine does, which takes /llm off what the visitor asked for."""
    with Reader.open(line.home.registry) as reader:
        settings = Settings.model_validate({"http": {"trusted_proxies": proxies}})
        app = create_app(line.home, reader, CollectorRegistry(), lambda: None, settings=lambda: settings)
        with HttpServer(app, "127.0.0.1", 0) as (host, port):
            headers = {**TOLD, "Host": "localhost"}
            with httpx.Client(base_url=f"http://{host}:{port}", trust_env=False, headers=headers) as client:
                yield client


@pytest.mark.parametrize("proxies", [("127.0.0.1",), ("10.0.0.0/8", "127.0.0.0/8"), ("*",)])
def test_addresses_are_those_of_the_visitor(line: "Line", proxies: tuple[str, ...]) -> None:
    line.publish(b"one")
    line.publish(b"two")
    with behind(line, proxies) as client:
        page = client.get("/").text
        assert f"{PUBLIC}/v1/heads/main/versions/2/files" in page
        links = re.findall(r'href="(/[^"]*)"', page)
        assert links and all(link.startswith("/llm/") for link in links)
        manifest = client.get("/v1/heads").json()["heads"][0]["manifest"]
        assert manifest == "/llm/v1/heads/main/versions/2"
        assert client.get(manifest.removeprefix("/llm")).status_code == 200
        following = client.get("/v1/lineage?limit=1").json()["next"]
        assert following == "/llm/v1/lineage?limit=1&after=1"
        assert [one["version"] for one in client.get(following.removeprefix("/llm")).json()["experts"]] == [2]
        for path in ("/v1/heads/main/latest", "/v1/heads/main/latest/files/model.safetensors"):
            led = urljoin(PUBLIC + path, client.get(path).headers["location"])
            assert led.startswith(f"{PUBLIC}/v1/heads/main/versions/2")
            assert client.get(led.removeprefix(PUBLIC)).status_code == 200


@pytest.mark.parametrize("proxies", [(), ("192.0.2.1", "10.0.0.0/8", "::1")])
def test_nobody_else_is_believed(line: "Line", proxies: tuple[str, ...]) -> None:
    line.publish(b"one")
    with behind(line, proxies) as client:
        page = client.get("/").text
        assert "http://localhost/v1/heads/main/versions/1/files" in page and "llm" not in page
        assert client.get("/v1/heads").json()["heads"][0]["manifest"] == "/v1/heads/main/versions/1"


def test_the_name_is_checked_all_the_same(line: "Line") -> None:
    with behind(line, ("127.0.0.1",)) as client:
        answer = client.get("/", headers={"Host": "evil.example", "X-Forwarded-Host": "localhost"})
        assert answer.status_code == 421


@pytest.mark.parametrize("prefix", ["", "/", "llm", "//evil.example", "/a/../b", "/a b", '/"><script>', "/a?b", "/é"])
def test_what_is_no_prefix_is_none(line: "Line", prefix: str) -> None:
    with behind(line, ("127.0.0.1",)) as client:
        answer = client.get("/v1/heads", headers={"X-Forwarded-Prefix": prefix.encode()})
        assert answer.json()["heads"][0]["manifest"] == "/v1/heads/main/versions/0"


def test_a_proxy_is_an_address_or_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAINSTEM_HTTP__TRUSTED_PROXIES", '["10.0.0.0/8", "::1", "*"]')
    assert load(None).http.trusted_proxies == ("10.0.0.0/8", "::1", "*")
    monkeypatch.setenv("MAINSTEM_HTTP__TRUSTED_PROXIES", '["nginx"]')
    with pytest.raises(BadConfig, match=r"trusted_proxies.*nginx"):
        load(None)
