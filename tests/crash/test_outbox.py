"""The process dies where it has told others and not written that down, or before it has: each event is told all the
same, in order, and what is told twice is called the same."""

import json
import os
import signal

import pytest

from daemon.disk.failpoints import OUTBOX_POINTS
from tests.crash.invariants import check, sha256
from tests.crash.worlds import MakeFolder, World, drain, fill_inbox
from tests.daemon.outbox.receiver import receiving

(MADE,) = OUTBOX_POINTS
TOLD = ["published 1", "published 1", "refused c.safetensors"]  # of two heads


@pytest.mark.parametrize(
    ("failpoint", "unwritten"),
    [
        ("commit.after=kill", 0),
        pytest.param(f"{MADE}=kill", 1, marks=pytest.mark.slow),
        (f"{MADE}=kill:2", 2),
    ],
)
def test_what_happened_is_told_whenever_the_process_dies(
    failpoint: str, unwritten: int, world: World, make_folder: MakeFolder
) -> None:
    home = world.home(make_folder("told") / "home", fill=False)
    drops = [path for path in world.drops if path.name in ("a.safetensors", "c.safetensors")]
    fill_inbox(home, drops)
    with receiving() as receiver:
        hook = {"MAINSTEM_WEBHOOKS": json.dumps([receiver.webhook(events=["published", "refused"])])}
        assert world.zygote.run(*drain(home), **hook, MAINSTEM_FAILPOINT=failpoint).code == -signal.SIGKILL
        ended = world.zygote.run(*drain(home), **hook)
        assert ended.code == 0, ended.log
        told = [(one.message, one.what) for one in receiver.requests]
    each = list(dict(told).items())
    assert [what for _, what in each] == TOLD
    assert told == [*each[:unwritten], *each], told  # what was not written down, and then all of it in order
    check(home, [sha256(path) for path in drops], {})
    assert not os.listdir(home.inbox)
