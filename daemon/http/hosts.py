"""By which names a server may be asked.

A page that a visitor's browser has open can let its own name lead to an address of ours (DNS rebinding), and then read
what we say: the browser takes us for that page's server. Its requests still carry that name as their host.
"""

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from daemon.config import taking_effect
from daemon.http.answers import Problem
from projector.text import shown

ANY = "*"


class Hosts:
    """The names that are ours. Those of the loopback always are: none of them can be made to lead elsewhere."""

    def __init__(self, bound: str, allowed: Sequence[str] = ()) -> None:
        """`bound`: the address that is listened on. `allowed`: further names, `*.example.org` for all below one, `*`
        for any. With none, any name will do, except where only the loopback is listened on.
        """
        self._any = ANY in allowed or (not allowed and not _loopback(bound))
        self._names = {_name(name) for name in (bound, *allowed)}

    def __contains__(self, host: str) -> bool:
        """True where a Host header is ours. Without one, as HTTP/1.0 may be, no browser is asking; and who asks by an
        address was led here by no name.
        """
        name = _name(host)
        below = ("*." + name.split(".", n)[n] for n in range(1, name.count(".") + 1))
        return (
            self._any
            or not host
            or _is_address(name)
            or _loopback(name)
            or name in self._names
            or not self._names.isdisjoint(below)
        )


class HostCheck:
    """ASGI middleware: who asks by another name is refused, whatever for."""

    def __init__(self, app: ASGIApp, hosts: Hosts) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else ""
        if host in self._hosts:
            await self._app(scope, receive, send)
            return
        problem = Problem(
            421,
            "foreign_host",
            f"this server does not go by the name {shown(host)}",
            taking_effect("add that name to http.allowed_hosts, or ask by 127.0.0.1 or localhost"),
        )
        await problem.response()(scope, receive, send)


def _name(host: str) -> str:
    """The name in a Host header, or as somebody sets it, without scheme, brackets and port."""
    host = host.rpartition("://")[2].partition("/")[0]
    if _is_address(host):  # an IPv6 one without brackets
        return host
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.strip().lower().rstrip(".")


def _loopback(name: str) -> bool:
    if name == "localhost" or name.endswith(".localhost"):
        return True
    return _is_address(name) and ipaddress.ip_address(name).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
