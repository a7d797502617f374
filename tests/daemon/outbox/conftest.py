"""A receiver for each test."""

from collections.abc import Iterator

import pytest

from tests.daemon.outbox.receiver import Receiver, receiving


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver
