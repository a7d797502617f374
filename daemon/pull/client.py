"""How `mainstem pull` and `push` ask: one origin, connections that are kept, and every fault sorted by whether it may
pass.

It asks that origin and no other: an answer that sends it elsewhere is an error, and proxies of the environment are not
used. Whatever the network does is `Passing`; what the server says for good is a plain DaemonError in its own words.
"""

import http.client
import json
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import BinaryIO
from urllib.parse import quote, urljoin, urlsplit

from daemon.errors import DaemonError, Reason
from projector.text import shown

CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 30.0  # without a byte
PROBLEM_BYTES = 64 << 10
MAY_PASS = (408, 429, 502, 503, 504)  # what servers say while they start, stop or are busy, and proxies for them


Body = bytes | BinaryIO | Iterator[bytes] | None


class Passing(DaemonError):
    """The network broke, or the server is away or busy: worth another try."""


class Gone(DaemonError):
    """The server had this version and has it no more."""


class Damaged(DaemonError):
    """The server cannot give what it should have, or gives other bytes than it announced."""


@dataclass(frozen=True)
class Origin:
    """Where a mainstem serves. `root` is the path in front of /v1: empty, unless a proxy put one there. `token`: what
    that proxy wants to see.
    """

    scheme: str
    host: str
    port: int | None
    root: str
    token: str | None = field(default=None, repr=False)

    @staticmethod
    def of(url: str, token: str | None = None) -> "Origin":
        """The origin that a person typed. DaemonError where it, or the token, is none."""
        if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
            raise DaemonError(Reason.PULL, "the token has letters that none can have", "it is ASCII without spaces")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise _no_address(url) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise _no_address(url)
        if parts.username is not None or not f"{parts.hostname}{parts.path}".isascii() or not url.isprintable():
            raise _no_address(url)
        return Origin(parts.scheme, parts.hostname, port, parts.path.rstrip("/"), token)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{'' if self.port is None else f':{self.port}'}{self.root}"

    def head(self, name: str) -> str:
        """The path of a head; whatever the name holds stays one piece of it."""
        return f"{self.root}/v1/heads/{quote(name, safe='')}"

    def url(self, path: str) -> str:
        """The whole address of a path, as `head` and others begin them."""
        return f"{str(self)[: len(str(self)) - len(self.root)]}{path}"

    def path_of(self, location: str, asked: str) -> str | None:
        """The path that a redirect from `asked` leads to, or None where it leads to another origin."""
        try:
            there, here = urlsplit(urljoin(self.url(asked), location)), urlsplit(self.url(asked))
            same = (there.scheme, there.hostname, there.port) == (here.scheme, here.hostname, here.port)
        except ValueError:
            return None
        return there.path if same else None


class Connection:
    """One connection, opened when it is needed and kept for the next request. Not for two threads, but for `abort`."""

    def __init__(self, origin: Origin, timeout: float = TIMEOUT_SECONDS) -> None:
        self._origin = origin
        secure = origin.scheme == "https"
        known = {"Authorization": f"Bearer {origin.token}"} if origin.token else {}
        self._always = {"Accept-Encoding": "identity", **known}
        make = HTTPSConnection if secure else HTTPConnection
        # The port in any case: without one, http.client takes the end of an IPv6 address for it.
        self._http = make(origin.host, origin.port or make.default_port, timeout=timeout)

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    @contextmanager
    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Iterator[HTTPResponse]:
        """The answer to a GET, whatever its status; read it with `body`. Passing where there is none.

        An answer that was not read to its end costs the connection, and the next request opens another.
        """
        with self.ask("GET", path, headers) as answer:
            yield answer

    @contextmanager
    def ask(
        self, method: str, path: str, headers: Mapping[str, str] | None = None, body: Body = None
    ) -> Iterator[HTTPResponse]:
        """As `get`, by any method. body: read and sent in pieces; with the headers goes its Content-Length.

        A server that refuses what is coming answers before it has all: that answer counts, and not the broken pipe.
        """
        try:
            try:
                self._http.request(method, path, body, {**self._always, **(headers or {})})
            except (BrokenPipeError, ConnectionResetError):
                if body is None or self._http.sock is None:
                    raise
            answer = self._http.getresponse()
        except (HTTPException, OSError) as error:
            self._http.close()
            raise self._broken(path, error) from error
        try:
            yield answer
        except BaseException:
            self._http.close()
            raise
        if not answer.isclosed() and answer.length != 0:
            self._http.close()
        answer.close()

    def body(self, path: str, answer: HTTPResponse, size: int) -> Iterator[bytes]:
        """The next `size` bytes of an answer, as they come. Passing where it ends before."""
        left = size
        while left:
            try:
                chunk = answer.read1(min(left, CHUNK_BYTES))
            except (HTTPException, OSError) as error:
                raise self._broken(path, error) from error
            if not chunk:
                raise self._broken(path, ConnectionError(f"it ended {left} bytes early"))
            left -= len(chunk)
            yield chunk

    def text(self, path: str, answer: HTTPResponse, most: int) -> bytes:
        """An answer of no more than `most` bytes. DaemonError where it is longer, Passing where it breaks off."""
        try:
            found = answer.read(most + 1)
        except (HTTPException, OSError) as error:
            raise self._broken(path, error) from error
        if len(found) > most:
            raise self.refusal(path, f"the answer is longer than {most} bytes")
        if answer.length:
            raise self._broken(path, ConnectionError(f"it ended {answer.length} bytes early"))
        return found

    def problem(self, path: str, answer: HTTPResponse) -> DaemonError:
        """What an answer of another status means, in the server's own words where it has some."""
        where, location = self._origin.url(path), answer.headers["Location"]
        if location is not None and 300 <= answer.status < 400:
            return DaemonError(
                Reason.PULL,
                f"{where}: the server sends us elsewhere, to {shown(location)}",
                "if you trust that address, pull from it",
            )
        kind: type[DaemonError] = Damaged if answer.status >= 500 else DaemonError
        kind = Gone if answer.status == 410 else Passing if answer.status in MAY_PASS else kind
        detail, hint = f"{answer.status} {shown(answer.reason)}", "is this the address of a mainstem?"
        if answer.status in (401, 403):
            hint = "what stands before the server wants a token, or another one: --token, or MAINSTEM_TOKEN"
        with suppress(ValueError, KeyError, TypeError, RecursionError, HTTPException, OSError):
            said = json.loads(answer.read(PROBLEM_BYTES))
            detail, hint = shown(str(said["error"])), shown(str(said["hint"]))
        return kind(Reason.PULL, f"{where}: {detail}", hint)

    def refusal(self, path: str, what: str) -> DaemonError:
        """An answer that no mainstem gives."""
        return DaemonError(Reason.PULL, f"{self._origin.url(path)}: {what}", "is this the address of a mainstem?")

    def abort(self) -> None:
        """Wakes the thread that waits on this connection: its request fails."""
        held = self._http.sock
        if held is not None:
            with suppress(OSError):
                held.shutdown(socket.SHUT_RDWR)

    def _broken(self, path: str, error: Exception) -> DaemonError:
        where = self._origin.url(path)
        if isinstance(error, ssl.SSLCertVerificationError):
            return DaemonError(
                Reason.PULL, f"{where}: {error.verify_message}", "SSL_CERT_FILE names certificates to trust"
            )
        if isinstance(error, http.client.InvalidURL):
            return _no_address(where)
        said = str(error) or type(error).__name__
        return Passing(Reason.PULL, f"{where}: {said}", "is the daemon running, and is this its address? try again")


def _no_address(url: str) -> DaemonError:
    return DaemonError(Reason.PULL, f"{shown(url)} is no address of a mainstem", "for example http://127.0.0.1:8765")
