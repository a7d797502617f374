"""By which names the server may be asked: a page of somebody else's name is not to read what is here."""

from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.testclient import TestClient

from daemon.arrivals.uploads import Uploads
from daemon.config import Http, Settings
from daemon.http import create_app
from daemon.http.hosts import Hosts
from daemon.layout import Home
from registry.reader import Reader
from tests.daemon.processes import running

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

EVIL = ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "localhost.evil.example", "::evil", ":80"]
EVIL += ["notlocalhost", "evil.example#localhost", "x@localhost", "%6cocalhost", "0x7f.1", "2130706433"]
OURS = [
    "localhost",
    "LOCALHOST:8765",
    "localhost.",
    "127.0.0.1:8765",
    "127.3.2.1",
    "[::1]",
    "[::1]:8765",
    "a.localhost",
    "",
    "10.0.0.1:8765",  # no name led there
    "[::2]",
    "[::ffff:127.0.0.1]:8765",
]


@pytest.mark.parametrize("bound", ["127.0.0.1", "::1", "localhost"])
def test_on_the_loopback_only_its_names_will_do(bound: str) -> None:
    hosts = Hosts(bound)
    assert [host for host in OURS if host not in hosts] == []
    assert [host for host in EVIL if host in hosts] == []


def test_elsewhere_any_will_do_unless_some_are_named() -> None:
    assert "evil.example" in Hosts("0.0.0.0")
    hosts = Hosts("0.0.0.0", ("models.example", "*.lab.example"))
    for host in ("models.example:80", "Models.Example.", "a.lab.example", "a.b.lab.example", *OURS):
        assert host in hosts, host
    for host in ("x.models.example", "lab.example", "xlab.example", "evil.example", "example"):
        assert host not in hosts, host
    assert "evil.example" in Hosts("127.0.0.1", ("*",))
    assert "models.example" in Hosts("127.0.0.1", ("https://models.example:8765/",)), "as people write names"
    assert "192.0.2.7:8765" in Hosts("192.0.2.7", ("models.example",)), "the address that is listened on"


def test_every_address_is_guarded_and_the_answer_says_what_to_set(line: "Line") -> None:
    uploads = Uploads(line.home, Http.model_validate({"write_token": "a-token-of-enough-characters"}))
    with Reader.open(line.home.registry) as reader:
        app = create_app(line.home, reader, CollectorRegistry(), lambda: None, uploads, settings=Settings)
        client = TestClient(app, base_url="http://localhost")
        addresses = [(method, route.path) for route in app.routes for method in route.methods]  # type: ignore[attr-defined]
        assert len(addresses) > 20
        for method, path in [*addresses, ("GET", "/nowhere"), ("OPTIONS", "/")]:
            answer = client.request(method, path, headers={"Host": "evil.example"})
            assert answer.status_code == 421, (method, path)
            assert method == "HEAD" or answer.json()["reason"] == "foreign_host"
        answer = client.get("/livez", headers={"Host": "models.example:8765"})
        assert "models.example:8765" in answer.json()["error"]
        assert "http.allowed_hosts" in answer.json()["hint"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get("/").status_code == 200


def test_the_hint_works(home: Home) -> None:
    """Real servers: one refuses that name, another one lets it in, for the setting has it."""
    for verb, setting, status in (("run", "", 421), ("serve", 'allowed_hosts = ["models.example"]', 200)):
        home.config.write_text(f"[http]\n{setting}\n")
        with running(verb, "--home", home.root, "--port", "0") as daemon:
            assert daemon.get("/livez").status_code == 200
            headers = {"Host": "models.example"}
            assert httpx.get(f"{daemon.origin}/livez", headers=headers, trust_env=False).status_code == status
