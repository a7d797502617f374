"""The body of a commit, whatever pieces it comes in."""

import asyncio
import base64
import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.http.answers import Problem
from daemon.http.hub.commit_body import LINE_BYTES, Commit, read_commit
from daemon.http.upload_routes import Pieces

OID = "ab" * 32


class Sent:
    """A body in these pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter([piece for piece in pieces if piece])

    async def next(self) -> bytes:
        return next(self._pieces, b"")


def read(pieces: Iterable[bytes]) -> tuple[Commit, dict[str, bytes]]:
    """The commit, and the content of each file in it by its path."""
    taken: list[bytes] = []

    async def take(content: Pieces) -> str:
        whole = b""
        while piece := await content.next():
            whole += piece
        taken.append(whole)
        return str(len(taken) - 1)

    commit = asyncio.run(read_commit(Sent(pieces), take))
    return commit, {path: taken[int(file)] for path, file in commit.added.items() if file.isdecimal()}


def file(path: str, content: bytes) -> dict[str, Any]:
    value = {"content": base64.b64encode(content).decode(), "path": path, "encoding": "base64"}
    return {"key": "file", "value": value}


def body(*items: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in items)


HEADER = {"key": "header", "value": {"summary": "Upload model", "description": ""}}
LARGE = {"key": "lfsFile", "value": {"path": "model.safetensors", "algo": "sha256", "oid": OID, "size": 5}}
GONE = [{"key": "deletedFile", "value": {"path": "a"}}, {"key": "deletedFolder", "value": {"path": "b/"}}]


@given(st.lists(st.binary(max_size=50), max_size=4), st.integers(1, 40))
def test_in_pieces_of_any_size(contents: list[bytes], size: int) -> None:
    raw = body(HEADER, *(file(f"{n}.json", content) for n, content in enumerate(contents)), LARGE, *GONE)
    commit, files = read(raw[at : at + size] for at in range(0, len(raw), size))
    assert files == {f"{n}.json": content for n, content in enumerate(contents)}
    assert (commit.summary, commit.added["model.safetensors"]) == ("Upload model", OID)
    assert commit.removed == ["a", "b/"]


def test_a_file_that_is_longer_than_a_line_may_be() -> None:
    content = bytes(range(256)) * (3 * LINE_BYTES // 256)
    raw = body(HEADER, file("large", content), file("small", b"x"))
    _, files = read(raw[at : at + 65_536] for at in range(0, len(raw), 65_536))
    assert files == {"large": content, "small": b"x"}


def test_keys_in_another_order_without_spaces_and_without_a_last_line_end() -> None:
    item = {"value": {"path": "a", "encoding": "base64", "content": "eA=="}, "key": "file"}
    raw = body(HEADER) + b"\n" + json.dumps(item, separators=(",", ":")).encode()
    assert read([raw])[1] == {"a": b"x"}
    short = json.dumps(file("b", b"y"), separators=(",", ":")).encode()
    assert read([short])[1] == {"b": b"y"}


@pytest.mark.parametrize(
    "raw",
    [
        b"{",
        b"[]\n",
        b'{"key": "file"}\n',
        b'{"key": "file", "value": {"path": "a"}}\n',
        b'{"key": "file", "value": {"content": "eA==", "encoding": "base64"}}\n',
        b'{"key": "file", "value": {"content": "eA==", "path": "a", "encoding": "utf-8"}}\n',
        b'{"key": "file", "value": {"content": "e\\u0041==", "path": "a"}}\n',
        b'{"key": "file", "value": {"content": "eA=", "path": "a"}}\n',
        b'{"key": "file", "value": {"content": "eA==',
        b'{"key": "lfsFile", "value": {"path": "a", "algo": "md5", "oid": "00"}}\n',
        b'{"key": "lfsFile", "value": {"path": "a"}}\n',
        b'{"key": "other", "value": {}}\n',
        b"[" * 100_000,
    ],
)
def test_what_is_no_commit(raw: bytes) -> None:
    with pytest.raises(Problem) as refused:
        read([raw])
    assert (refused.value.status, refused.value.reason) == (400, "bad_list")


def test_what_is_too_long() -> None:
    for raw in (b"x" * (LINE_BYTES + 100), b"\n" * 20_000):
        with pytest.raises(Problem) as refused:
            read(raw[at : at + 65_536] for at in range(0, len(raw), 65_536))
        assert (refused.value.status, refused.value.reason) == (413, "too_long")
