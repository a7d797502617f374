"""What the recipes in this folder share: one request to a model server, and an end with exit status 1 where it fails.

No more than Python 3.9 is needed. SERVER_API_KEY in the environment is sent as a bearer token.
"""

import json
import os
import sys
import urllib.error
import urllib.request
from typing import Any

SECONDS = 1800  # the hook's own timeout_seconds ends it before


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other that is no success: the key goes to nobody else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def ask(url: str, body: "dict[str, Any] | None" = None, refusals: "tuple[int, ...]" = ()) -> Any:
    """POSTs a JSON body, and returns the answer, from JSON where it is JSON. refusals: statuses that are no failure."""
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("SERVER_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body or {}).encode(), headers, method="POST")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirects)
    try:
        with direct.open(request, timeout=SECONDS) as response:
            answer, status = response.read(), response.status
    except urllib.error.HTTPError as error:
        answer, status = error.read(), error.code
    except OSError as error:
        fail(url, error)
    text = answer.decode(errors="replace")
    if not 200 <= status < 300 and status not in refusals:
        fail(url, f"{status}: {text}")
    try:
        return json.loads(text)
    except ValueError:
        return text


def ask_sglang(url: str, body: "dict[str, Any]") -> None:
    """The same of SGLang, which says in its answer whether it did what it was asked."""
    answer = ask(url, body)
    if not isinstance(answer, dict) or not answer.get("success"):
        fail(url, answer)


def fail(url: str, why: object) -> "Any":
    """Ends with exit status 1: the hook is tried again later."""
    sys.exit(f"{url}: {why}")
