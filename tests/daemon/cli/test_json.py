"""--json: every command that has it prints what docs/json.md says, key by key."""

import json
import os
import shutil
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from typer.main import get_command
from typer.testing import CliRunner

from daemon.arrivals.uploads import Uploads
from daemon.cli.app import app
from daemon.config import Http
from daemon.http import HttpServer, create_app
from daemon.interventions.deeds import Request, carry_out
from registry.reader import Reader
from registry.records import Deed, EndpointKind, Event, NewEndpoint
from registry.store import Store
from tests.daemon.homes import drain, make_home, put
from tests.daemon.processes import forked_each
from tests.jsons import described, documented
from tests.models import write_base, write_expert

NOBODY = "http://127.0.0.1:9/"  # where nobody listens
TOKEN = "a-token-of-enough-characters"
ELSEWHERE = {
    "study": "tests/daemon/study/test_study.py",
    "convert": "tests/daemon/convert/test_convert.py",
    "reload": "tests/daemon/test_reloading.py",
    "zipit": "tests/daemon/zipit/test_zipit.py",
    "export VERSION OUT": "tests/daemon/versions/test_routed.py",
}
COMMANDS = {
    "status": (),
    "status --all DIR": (),
    "log": (),
    "log --versions": (),
    "log --interventions": (),
    "show EXPERT": ("show", "1"),
    "show VERSION": ("show", "main/1"),
    "report": (),
    "compare A B": ("compare", "main/1", "main/2"),
    "inspect PATH": ("inspect", "{aside}/good.safetensors"),
    "inspect PATH, refused": ("inspect", "{aside}/bad.safetensors"),
    "verify": (),
    "methods": (),
    "evaluate": ("evaluate", "main/1"),
    "quarantine list": (),
    "quarantine show": ("quarantine", "show", "3"),
    "config show": (),
    "doctor": (),
    "health": (),
    "webhooks list": (),
    "webhooks test": (),
    "pause": (),
    "resume": (),
    "rollback VERSION": ("rollback", "main/0", "--dry-run"),
    "promote VERSION": ("promote", "main/2", "--dry-run"),
    "block ID": ("block", "the-base.safetensors", "--dry-run"),
    "unblock ID": ("unblock", "3", "--dry-run"),
    "pin VERSION": ("pin", "main/1", "--dry-run"),
    "unpin VERSION": ("unpin", "main/1", "--dry-run"),
    "gc": ("gc", "--dry-run"),
    "prune": ("prune", "--dry-run"),
    "quarantine retry": ("quarantine", "retry", "3", "--dry-run"),
    "quarantine discard": ("quarantine", "discard", "3", "--dry-run"),
    "webhooks redeliver": ("webhooks", "redeliver", "--all-dead"),
    "push PATH URL": ("push", "{aside}/good.safetensors", "{url}", "--token", TOKEN),
    "pull URL DEST": ("pull", "{url}", "{aside}/pulled"),
}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each command prints, of a home in which there is something of everything."""
    root = tmp_path_factory.mktemp("json")
    base, aside = write_base(root / "base.safetensors", seed=1), root / "aside"
    home = make_home(root / "homes" / "home", base)
    aside.mkdir()
    for seed, scale in ((2, 0.01), (3, 0.2)):
        put(home, write_expert(root / f"{seed}.safetensors", base, seed, scale=scale))
        drain(home)
    (home.inbox / "bad.safetensors").write_bytes(b"no tensors")
    shutil.copy(base, home.inbox / "the-base.safetensors")
    drain(home)
    write_expert(aside / "good.safetensors", base, 9)
    (aside / "bad.safetensors").write_bytes(b"no tensors")
    (root / "score").write_text("echo '{\"sort\": 0.5}'")
    webhook = f'[[webhooks]]\nurl = "{NOBODY}"\nallow_private = true\nsecret = "whsec_{"MTIz" * 8}"\n'
    home.config.write_text(f'[evaluate]\ncommand = ["sh", "{root}/score", "{{folder}}"]\n{webhook}')
    with Store.open(home.registry) as store:
        store.follow_endpoints([NewEndpoint(EndpointKind.WEBHOOK, NOBODY, tuple(Event))])
        carry_out(home, store, Request(Deed.ROLLBACK, "ada", "why", head="main", version=1))
    shutil.copy(aside / "good.safetensors", home.inbox / "waits.safetensors")
    with Reader.open(home.registry) as reader:
        uploads = Uploads(home, Http.model_validate({"write_token": TOKEN}))
        server = HttpServer(create_app(home, reader, CollectorRegistry(), lambda: None, uploads), "127.0.0.1", 0)
        host, port = server.start()
        words = {"aside": aside, "url": f"http://{host}:{port}"}
        lines = []
        for name, said in COMMANDS.items():
            filled = [word.format(**words) for word in said or name.replace("DIR", str(root)).split()]
            bare = name.startswith(("pull", "push", "methods", "status --all"))
            lines.append([*filled, "--json", *([] if bare else ["--home", str(home.root)])])
        done = forked_each(lines, first=lambda: os.environ.update(MAINSTEM_LOG__LEVEL="error"))
        server.stop()
    found = {name: one.stdout for name, one in zip(COMMANDS, done, strict=True)}
    assert all(found.values()), [(one.args, one.stderr) for one in done if not one.stdout]
    return {name: json.loads(text) for name, text in found.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_printed_is_what_the_page_says(printed: dict[str, Any], name: str) -> None:
    value = printed[name]
    if name == "config show":  # every setting, which docs/settings.md lists
        value = {"heads": value["heads"]}
    assert f"| `mainstem {name}` | {described(value)} |" == f"| `mainstem {name}` | {documented().get(name)} |"


def test_it_says_whether_anything_was_changed(printed: dict[str, Any]) -> None:
    paused, pinned = printed["pause"], printed["pin VERSION"]
    assert paused["changed"] and paused["deed"] == "pause" and "no expert is taken" in paused["told"][0]
    assert not pinned["changed"] and "main/1 is kept" in pinned["told"][0], "only what would be"
    assert printed["unpin VERSION"] == {"deed": "unpin", "changed": False, "told": []}


def test_every_command_that_prints_json_is_there() -> None:
    tree = get_command(app)
    leaves = {
        (name if not hasattr(command, "commands") else f"{name} {below}"): one
        for name, command in tree.commands.items()  # type: ignore[attr-defined]
        for below, one in getattr(command, "commands", {"": command}).items()
    }
    printing = {name for name, one in leaves.items() if any("--json" in option.opts for option in one.params)}
    covered = {*documented()}
    assert {
        name for name in printing if not any(row.split(" ")[: len(name.split())] == name.split() for row in covered)
    } == set()
    assert covered == {*COMMANDS, *ELSEWHERE} | {"pull --watch", "status --watch"}


def test_commands_complete_themselves() -> None:
    asked = {"_MAINSTEM_COMPLETE": "complete_bash", "COMP_WORDS": "mainstem pr", "COMP_CWORD": "1"}
    done = CliRunner().invoke(app, [], env=asked, prog_name="mainstem")
    assert done.output.split() == ["promote", "prune"]
