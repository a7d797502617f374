"""Ranges and conditions against RFC 9110: which bytes are asked for, and what is answered over a real connection."""

import email
import email.policy
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.http.ranges import MOST_RANGES, Malformed, Unsatisfiable, spans

if TYPE_CHECKING:
    from tests.daemon.http.conftest import Line

FILE = "/v1/heads/main/versions/1/files/model.safetensors"
DATA = bytes(i * i % 251 for i in range(20_000))


@pytest.fixture
def one(line: "Line") -> "Line":
    line.publish(DATA)
    return line


def parts(answer: httpx.Response) -> list[tuple[str, bytes]]:
    """(Content-Range, bytes) of each part, by the standard library's parser of multipart bodies."""
    head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
    message = email.message_from_bytes(head + answer.content, policy=email.policy.HTTP)
    assert message.is_multipart() and not message.defects
    found = []
    for part in message.iter_parts():
        assert part["Content-Type"] == "application/octet-stream"
        found.append((part["Content-Range"], part.get_payload(decode=True)))
    return found


@given(
    st.integers(1, 3000),
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, 4000), st.none() | st.integers(0, 4000)).filter(
                lambda pair: pair[1] is None or pair[0] <= pair[1]
            ),
            st.tuples(st.none(), st.integers(0, 4000)),
        ),
        min_size=1,
        max_size=12,
    ),
)
def test_the_spans_cover_exactly_what_was_asked_for_and_nothing_twice(
    size: int, asked: list[tuple[int | None, int | None]]
) -> None:
    header = "bytes=" + ", ".join(f"{'' if a is None else a}-{'' if b is None else b}" for a, b in asked)
    wanted: set[int] = set()
    for first, last in asked:
        if first is None:
            assert last is not None
            wanted |= set(range(max(0, size - last), size))
        else:
            wanted |= set(range(first, size if last is None else min(last + 1, size)))
    if not wanted:
        with pytest.raises(Unsatisfiable):
            spans(header, size)
        return
    found = spans(header, size)
    assert found is not None
    covered = [i for first, end in found for i in range(first, end)]
    assert wanted <= set(covered) <= set(range(size))
    assert len(covered) == len(set(covered))
    assert sum(end - first for first, end in found) <= size


@pytest.mark.parametrize(
    ("header", "found"),
    [
        ("bytes=0-0", [(0, 1)]),
        ("BYTES = 0-0", [(0, 1)]),
        ("bytes=990-2000", [(990, 1000)]),
        ("bytes=-2000", [(0, 1000)]),
        ("bytes=,0-1 ,, ", [(0, 2)]),
        ("bytes=900-909, 0-9", [(900, 910), (0, 10)]),  # in the order in which they were asked for
        ("bytes=900-909, 0-9, 905-919", [(900, 920), (0, 10)]),
        ("bytes=0-9, 5000-, 500-509", [(0, 10), (500, 510)]),
        ("bytes=0-9, 50-59", [(0, 60)]),  # a second part would cost more than the gap
        ("bytes=0-" + "9" * 5000, [(0, 1000)]),
        ("bytes=0-9,500-509,0-999", [(0, 1000)]),
        ("tensors=0-1", None),
        ("bytes=" + ",".join(["0-0"] * (MOST_RANGES + 1)), None),
    ],
)
def test_what_a_header_asks_for(header: str, found: list[tuple[int, int]] | None) -> None:
    assert spans(header, 1000) == found


@pytest.mark.parametrize("header", ["bytes=1000-", "bytes=-0", "bytes=5000-6000,-0", "bytes=" + "9" * 5000 + "-"])
def test_what_lies_beyond_the_end(header: str) -> None:
    with pytest.raises(Unsatisfiable):
        spans(header, 1000)


MALFORMED = [
    "bytes=",
    "bytes",
    "bytes=-",
    "bytes=5-4",
    "bytes=a-b",
    "bytes=0-1,x",
    "bytes=+1-2",
    "bytes=1-2-3",
    "bytes=0x1-2",
]


@pytest.mark.parametrize("header", [*MALFORMED, "bytes=١-٢"])
def test_what_is_no_range(header: str) -> None:
    with pytest.raises(Malformed):
        spans(header, 1000)


@pytest.mark.parametrize("header", MALFORMED)
def test_a_malformed_range_is_told(one: "Line", client: httpx.Client, header: str) -> None:
    answer = client.get(FILE, headers={"Range": header})
    assert (answer.status_code, answer.json()["reason"]) == (400, "bad_range")


def test_several_ranges_are_a_multipart_of_the_announced_length(one: "Line", client: httpx.Client) -> None:
    answer = client.get(FILE, headers={"Range": "bytes=15000-15009, 0-9, 19999-30000, 90000-, -1000"})
    assert answer.status_code == 206
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "content-range" not in answer.headers
    assert answer.headers["etag"] == client.head(FILE).headers["etag"]
    assert parts(answer) == [
        ("bytes 15000-15009/20000", DATA[15000:15010]),
        ("bytes 0-9/20000", DATA[:10]),
        ("bytes 19000-19999/20000", DATA[19000:]),
    ]


def test_overlapping_ranges_never_send_more_than_the_file(one: "Line", client: httpx.Client) -> None:
    answer = client.get(FILE, headers={"Range": "bytes=" + ",".join(f"{i}-" for i in range(MOST_RANGES))})
    assert answer.status_code == 206
    assert answer.headers["content-range"] == "bytes 0-19999/20000"
    assert answer.content == DATA


def test_one_part_carries_the_digest_of_the_whole(one: "Line", client: httpx.Client) -> None:
    whole, part = client.get(FILE), client.get(FILE, headers={"Range": "bytes=5-6"})
    for name in ("repr-digest", "etag", "cache-control", "last-modified", "content-type"):
        assert part.headers[name] == whole.headers[name]


def test_beyond_the_end_the_size_is_told(one: "Line", client: httpx.Client) -> None:
    for header in ("bytes=20000-", "bytes=-0", "bytes=20000-,30000-40000"):
        answer = client.get(FILE, headers={"Range": header})
        assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */20000"), header
        assert answer.json()["reason"] == "beyond_the_end"
        assert "repr-digest" not in answer.headers


def test_head_ignores_a_range(one: "Line", client: httpx.Client) -> None:
    """RFC 9110, 14.2: range handling is defined for GET alone."""
    for header in ("bytes=0-0", "bytes=90000-", "bytes=x"):
        answer = client.head(FILE, headers={"Range": header})
        assert (answer.status_code, answer.headers["content-length"]) == (200, "20000"), header
        assert "content-range" not in answer.headers


def test_an_empty_file_has_no_ranges(line: "Line", client: httpx.Client) -> None:
    line.publish(b"")
    for header in ("bytes=0-", "bytes=-1"):
        answer = client.get(FILE, headers={"Range": header})
        assert (answer.status_code, answer.content, answer.headers["content-length"]) == (200, b"", "0"), header


def test_if_range_needs_the_strong_tag(one: "Line", client: httpx.Client) -> None:
    tag = client.head(FILE).headers["etag"]
    for given_tag, status in ((tag, 206), (f"W/{tag}", 200), (tag.strip('"'), 200), ("*", 200), (f"{tag}, {tag}", 200)):
        answer = client.get(FILE, headers={"Range": "bytes=1-2", "If-Range": given_tag})
        assert answer.status_code == status, given_tag


def test_a_304_repeats_what_guides_a_cache_and_nothing_else(one: "Line", client: httpx.Client) -> None:
    whole = client.get(FILE)
    for method in ("GET", "HEAD"):
        answer = client.request(method, FILE, headers={"If-None-Match": whole.headers["etag"], "Range": "bytes=0-1"})
        assert (answer.status_code, answer.content) == (304, b"")
        for name in ("etag", "cache-control"):
            assert answer.headers[name] == whole.headers[name]
        assert not {"content-type", "repr-digest", "last-modified", "content-range"} & set(answer.headers)
        assert answer.headers.get("content-length") is None


def test_if_none_match_over_several_lines(one: "Line", client: httpx.Client) -> None:
    tag = client.head(FILE).headers["etag"]
    lines = [("If-None-Match", '"a"'), ("If-None-Match", f'W/"b", W/{tag}')]
    assert client.get(FILE, headers=lines).status_code == 304


def test_if_match(one: "Line", client: httpx.Client) -> None:
    tag = client.head(FILE).headers["etag"]
    for asked in (tag, "*", f'"other", {tag}'):
        assert client.get(FILE, headers={"If-Match": asked}).status_code == 200, asked
    for asked in ('"other"', f"W/{tag}", "x"):
        answer = client.get(FILE, headers={"If-Match": asked})
        assert (answer.status_code, answer.json()["reason"]) == (412, "precondition"), asked


def test_dates(one: "Line", client: httpx.Client) -> None:
    written = client.head(FILE).headers["last-modified"]
    earlier = format_datetime(datetime.now(UTC) - timedelta(days=1), usegmt=True)
    tag = client.head(FILE).headers["etag"]
    for headers, status in (
        ({"If-Modified-Since": written}, 304),
        ({"If-Modified-Since": earlier}, 200),
        ({"If-Modified-Since": "yesterday"}, 200),
        ({"If-Modified-Since": written, "If-None-Match": '"other"'}, 200),  # a tag decides alone
        ({"If-Unmodified-Since": written}, 200),
        ({"If-Unmodified-Since": earlier}, 412),
        ({"If-Unmodified-Since": "yesterday"}, 200),
        ({"If-Modified-Since": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, 200),
        ({"If-Modified-Since": "Mon, 01 Jan 2024 00:00:00 +99999999999999999999"}, 200),
        ({"If-Unmodified-Since": earlier, "If-Match": tag}, 200),
    ):
        assert client.get(FILE, headers=headers).status_code == status, headers
