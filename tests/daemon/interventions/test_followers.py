"""Who follows a head hears of a rollback at once: long-pollers, and `pull --watch`."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx

from daemon.layout import Home
from daemon.pull.pulling import follow
from tests.daemon.interventions.test_rollback import did
from tests.daemon.processes import running
from tests.daemon.pulls import same_bytes

LONG = 60  # seconds that none of these would take by itself


def test_a_rollback_answers_who_waits(merged: Home, tmp_path: Path) -> None:
    with running("run", "--home", merged.root, MAINSTEM_HTTP__PORT="0") as daemon, ThreadPoolExecutor(4) as pool:
        daemon.wait_for(4)

        def wait(query: str) -> str:
            url = f"{daemon.origin}/v1/heads/main/latest?{query}&timeout={LONG}"
            answer = httpx.get(url, trust_env=False, verify=False, timeout=2 * LONG)
            return f"{answer.status_code} {answer.headers.get('location')}"

        with closing(follow(daemon.origin, tmp_path / "model")) as versions:
            assert next(versions).version == 4
            waiting = [pool.submit(wait, query) for query in ("wait_for=5", "have=4", "wait_for=5&have=4")]
            following = pool.submit(next, versions)
            done = did(merged, "rollback", "2")
            assert done.startswith("main/2 is live")
            assert {one.result(LONG / 4) for one in waiting} == {"307 versions/2"}
            assert following.result(LONG / 4).version == 2
            assert same_bytes(tmp_path / "model", merged, 2)

            assert wait("have=4") == wait("have=1") == "307 versions/2", "what is live is another already"
            again = [pool.submit(wait, query) for query in ("wait_for=3", "have=2")]
            following = pool.submit(next, versions)
            did(merged, "promote", "4")
            assert {one.result(LONG / 4) for one in again} == {"307 versions/4"}
            assert following.result(LONG / 4).version == 4
