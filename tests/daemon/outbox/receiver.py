"""A receiver of webhooks on this machine, which keeps what it is sent and answers as it is told to."""

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from daemon.config import Settings
from tests.daemon.processes import until

KEY = b"0123456789abcdef0123456789abcdef"
SECRET = f"whsec_{base64.b64encode(KEY).decode()}"
SECONDS = 30  # which no test waits for
Reply = tuple[int, str]


@dataclass(frozen=True)
class Received:
    """A request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def said(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def message(self) -> str:
        return self.headers["webhook-id"]

    @property
    def what(self) -> str:
        """The event and what it is about, in short."""
        data = self.said["data"]
        about = data.get("version") or data.get("expert") or data.get("number") or data.get("reason")
        return f"{self.said['type']} {about}"


@dataclass
class Receiver:
    """What came, in order. `answer` says what a request is answered: a status and a text."""

    url: str
    requests: list[Received] = field(default_factory=list)
    answer: Callable[[Received], Reply] = lambda request: (204, "")

    def wait(self, count: int) -> list[Received]:
        """The requests, once there are so many."""
        assert until(lambda: len(self.requests) >= count, SECONDS), [one.what for one in self.requests]
        assert len(self.requests) == count, [one.what for one in self.requests]
        return list(self.requests)

    def settings(self, **more: Any) -> Settings:
        """Those that have it told of all, and nothing else."""
        return Settings.model_validate({"webhooks": [self.webhook(**more)]})

    def webhook(self, **more: Any) -> dict[str, Any]:
        return {"url": self.url, "secret": SECRET, "allow_private": True, **more}


@contextmanager
def receiving() -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"] or 0))
            request = Received(self.path, {key.lower(): value for key, value in self.headers.items()}, body)
            status, text = receiver.answer(request)
            receiver.requests.append(request)
            self.send_response(status)
            content = text.encode()
            if text.startswith("location: "):
                self.send_header("Location", text.removeprefix("location: "))
            if status == 503:
                self.send_header("Retry-After", "77")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    receiver = Receiver(f"http://127.0.0.1:{server.server_port}/told?who=me")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def verified(request: Received, *keys: bytes) -> bool:
    """As a receiver checks it who has one of these secrets, from the text of Standard Webhooks and no code of ours."""
    signed = b".".join((request.message.encode(), request.headers["webhook-timestamp"].encode(), request.body))
    wanted = {b"v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)) for key in keys}
    return bool(wanted & set(request.headers["webhook-signature"].encode().split(b" ")))
