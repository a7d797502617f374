"""One attempt to tell a URL: a POST, signed as Standard Webhooks has it (https://www.standardwebhooks.com).

A name may stand for any address, and for another one each time that it is asked for. So it is asked for once, what it
stands for is looked at, and the connection is made to just that. No redirect is followed, and no proxy is asked.
"""

import base64
import hashlib
import hmac
import http.client
import json
import socket
import ssl
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from threading import Event, Timer
from typing import Any
from urllib.parse import urlsplit

from daemon.layout import Home
from daemon.outbox.told import MOST_LETTERS, Answer, in_a_line, payload
from daemon.release import software_version
from daemon.sections import Webhook
from registry.records import Delivery

UNICAST = ip_network("2000::/3")  # what is given out of IPv6: others are old ways to write an address of IPv4, or local
NAT64 = ip_network("64:ff9b::/96")  # an address of IPv4 is in its last 32 bits
MOST_AGAIN_SECONDS = 3600.0
LEAST_SECONDS = 0.01


class Private(Exception):
    """The host has no public address."""


class Posting:
    """Tells one URL."""

    def __init__(self, home: Home, settings: Webhook, secrets: Sequence[bytes]) -> None:
        self._home = home
        self._settings = settings
        self._secrets = secrets
        self._aborted = Event()
        self._socket: socket.socket | None = None

    def abort(self) -> None:
        self._aborted.set()
        self._cut()

    def deliver(self, delivery: Delivery) -> Answer:
        return self.say(delivery.message, payload(self._home, delivery))

    def say(self, message: str, event: Mapping[str, Any]) -> Answer:
        """One attempt to tell of an event, as `payload` has it."""
        return self.post(message, json.dumps(event).encode())

    def post(self, message: str, content: bytes) -> Answer:
        """One attempt to tell that."""
        late = Event()

        def cut() -> None:
            late.set()
            self._cut()

        deadline = Timer(self._settings.timeout_seconds, cut)  # for all of it: each step has the same again
        deadline.daemon = True
        deadline.start()
        try:
            answer = self._post(message, content)
        except Private as error:
            return Answer(False, str(error))
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, TimeoutError):
                late.set()
            answer = Answer(False, in_a_line(f"no answer: {error!r}")[:MOST_LETTERS])
        finally:
            deadline.cancel()
            self._socket = None
        if late.is_set():  # an answer that we cut off looks whole to http.client
            return Answer(False, f"no answer within {self._settings.timeout_seconds:.6g} s")
        return answer

    def _post(self, message: str, content: bytes) -> Answer:
        url, seconds = urlsplit(self._settings.url), self._settings.timeout_seconds
        host, tls = url.hostname or "", url.scheme == "https"
        make = http.client.HTTPSConnection if tls else http.client.HTTPConnection
        # The port in any case: without one, http.client takes the end of an IPv6 address for it.
        connection = make(host, url.port or make.default_port, timeout=seconds)
        try:
            connection.sock = self._connected(host, connection.port, seconds, tls)
            now = str(int(time.time()))
            headers = {
                "Content-Type": "application/json",
                "User-Agent": f"mainstem/{software_version()}",
                "webhook-id": message,
                "webhook-timestamp": now,
                "webhook-signature": signature(self._secrets, message, now, content),
            }
            connection.request("POST", f"{url.path or '/'}{'?' if url.query else ''}{url.query}", content, headers)
            response = connection.getresponse()
            text = in_a_line(response.read(MOST_LETTERS).decode(errors="replace"))
            said = f"{response.status} {in_a_line(response.reason)}{text and ': '}{text}"[:MOST_LETTERS]
            return Answer(200 <= response.status < 300, said, _seconds(response.getheader("Retry-After")))
        finally:
            connection.close()

    def _connected(self, host: str, port: int, seconds: float, tls: bool) -> socket.socket:
        """A connection to one of the addresses that the host has just now. Raises Private where none may be asked, and
        OSError."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        allowed = [one for one in found if self._settings.allow_private or is_public(one[4][0])]
        if not allowed:
            first = str(found[0][4][0])
            what = host if host == first else f"{host} is {first}, which"
            raise Private(f"{what} is not a public address: `allow_private = true` under this [[webhooks]] allows it")
        failed: OSError | None = None
        end = time.monotonic() + seconds  # for all of them: a name may have hundreds
        for family, kind, protocol, _, address in allowed:
            one = socket.socket(family, kind, protocol)
            try:
                one.settimeout(max(LEAST_SECONDS, end - time.monotonic()))
                self._socket = one
                if self._aborted.is_set():
                    raise OSError("the daemon is stopping")
                one.connect(address)
                one.settimeout(seconds)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if tls:
                    self._socket = one = ssl.create_default_context().wrap_socket(one, server_hostname=host)
                return one
            except OSError as error:
                one.close()
                failed = error
                if time.monotonic() >= end:
                    raise TimeoutError from error
        assert failed
        raise failed

    def _cut(self) -> None:
        if open_socket := self._socket:
            with suppress(OSError):
                open_socket.shutdown(socket.SHUT_RDWR)


def signature(secrets: Sequence[bytes], message: str, timestamp: str, content: bytes) -> str:
    """One for each secret, apart by blanks."""
    signed = f"{message}.{timestamp}.".encode() + content
    digests = (hmac.new(secret, signed, hashlib.sha256).digest() for secret in secrets)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def is_public(address: str | int) -> bool:
    """True for an address that anybody in the internet has, and not for one that leads into a network like ours."""
    found: IPv4Address | IPv6Address | None = ip_address(str(address).partition("%")[0])
    if isinstance(found, IPv6Address):
        if found in NAT64:
            found = IPv4Address(int(found) & 0xFFFFFFFF)
        elif found.ipv4_mapped:
            found = found.ipv4_mapped
        elif found not in UNICAST or found.teredo or found.sixtofour:
            return False
    return bool(found and found.is_global and not found.is_multicast)


def _seconds(again: str | None) -> float | None:
    """What Retry-After says, where it is a number of seconds."""
    return min(float(again), MOST_AGAIN_SECONDS) if again and again.isascii() and again.isdigit() else None
