"""The rules of the house, read from the sources: who may import whom, and who may touch what."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("daemon", "projector", "registry")
MAY_IMPORT = {"daemon": {"projector", "registry"}, "projector": set(), "registry": set()}

DURABLE_CALLS = {
    *(f"os.{name}" for name in ("fsync", "fdatasync", "sync", "rename", "renames", "replace", "unlink", "remove")),
    *(f"os.{name}" for name in ("rmdir", "removedirs", "link", "symlink")),
    *("fcntl.flock", "fcntl.lockf", "shutil.rmtree", "shutil.move"),
}
DURABLE_METHODS = {"rename", "unlink", "rmdir", "symlink_to", "hardlink_to"}
METRICS = {"Counter", "Gauge", "Histogram", "Summary", "Info", "Enum"}
NOT_IN_PROJECTOR = {"pathlib", "time", "datetime", "logging", "structlog", "sqlalchemy", "sqlite3", "prometheus_client"}
ONLY_THERE = {"os": "projector/files/tensorfile.py", "tempfile": "projector/laws/trial.py"}
MOST_LINES = 500
FEWEST_LINES = 40
MANY_TEST_LINES = 400
NOT_LISTED = {"cli", "methods", "demo", "migrations"}  # one file for each verb, method, part, step

SOURCES = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


MODULES = {module_name(path): path for path in TREES}


def imported(path: str) -> Iterator[str]:
    """Every module that a file imports, wherever in it; `from a import b` is a.b where that is a module of ours."""
    package = module_name(path) if path.endswith("__init__.py") else module_name(path).rpartition(".")[0]
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (parent, node.module) if part)
            for alias in node.names:
                yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module


def calls(path: str) -> Iterator[tuple[str, ast.Call]]:
    """(dotted name as written, call) of every call in a file; "?" for an object without a name."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            yield dotted(node.func), node


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def taken_from(path: str, module: str) -> set[str]:
    """What a file takes by `from module import ...`."""
    found = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.ImportFrom) and node.module == module]
    return {alias.name for node in found for alias in node.names}


def test_there_is_something_to_read() -> None:
    assert {path.split("/")[0] for path in TREES} == set(ROOMS)
    assert "projector.driver.fold" in MODULES
    assert "projector.method" in set(imported("projector/driver/fold.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room: str) -> None:
    found = {
        f"{path} imports {name}"
        for path in TREES
        if path.startswith(f"{room}/")
        for name in imported(path)
        if name.split(".")[0] in {*ROOMS, "tests", "bench"} - {room} - MAY_IMPORT[room]
    }
    assert not found


def test_the_registry_knows_no_tensor() -> None:
    found = {
        f"{path} imports {name}"
        for path in TREES
        if path.startswith("registry/")
        for name in imported(path)
        if name.split(".")[0] in {"torch", "numpy", "safetensors"}
    }
    assert not found


def test_no_module_imports_itself_by_a_detour() -> None:
    """Imports inside functions count: a circle that is hidden is a circle."""
    graph = {name: {other for other in imported(path) if other in MODULES} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def rooms_in_order() -> list[str]:
    """The rooms, and the modules that lie in none, as docs/architecture.md has them: each after what it imports."""
    found, top = [], ""
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        if line.startswith("| ") and line.endswith("/ | holds |"):
            top = line.split("/")[0].removeprefix("| ")
        elif top and line.startswith("| `"):
            found += [f"{top}.{name.rstrip('/')}" for name in re.findall(r"`([\w/]+)`", line.split("|")[1])]
        elif not line.startswith("|"):
            top = ""
    return found


def room_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def test_rooms_import_only_from_those_before_them() -> None:
    place = {room: number for number, room in enumerate(rooms_in_order())}
    ours = [name for name in MODULES if name.startswith(("daemon.", "projector.")) and not name.endswith("__main__")]
    assert {room_of(name) for name in ours} == place.keys()
    found = {
        f"{name} imports {other}"
        for name in ours
        for other in imported(MODULES[name])
        if name.split(".")[0] == other.split(".")[0] and place[room_of(other)] > place[room_of(name)]
    }
    assert not found


def test_a_room_lists_its_files() -> None:
    for path, tree in TREES.items():
        room = Path(path).parent
        if path.endswith("__init__.py") and "." in module_name(path) and not NOT_LISTED & {*room.parts}:
            listed = set(re.findall(r"^    (\w+)\.py ", ast.get_docstring(tree, clean=False) or "", re.M))
            assert listed == {file.stem for file in (ROOT / room).glob("*.py")} - {"__init__"}, room


def test_files_are_short() -> None:
    long = {path: lines for path in TREES if (lines := len((ROOT / path).read_text().splitlines())) > MOST_LINES}
    assert not long


def test_a_small_module_says_why_it_is_one() -> None:
    """Its docstring has "of its own", and a reason; a verb, a method or a step is a module anyway."""
    silent = {
        path
        for path, tree in TREES.items()
        if not path.endswith(("/__init__.py", "/__main__.py")) and not NOT_LISTED & {*Path(path).parts}
        if len((ROOT / path).read_text().splitlines()) < FEWEST_LINES
        if "of its own" not in (ast.get_docstring(tree) or "").replace("\n", " ")
    }
    assert not silent


def test_long_tests_are_named() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        lines = len(path.read_text().splitlines())
        if lines > MANY_TEST_LINES:
            print(f"{path.relative_to(ROOT)} has {lines} lines")


def test_only_the_reader_and_the_store_open_transactions() -> None:
    """A migration is a transaction of its own, before any store is open."""
    found = []
    for path in TREES.keys() - {"registry/reader.py", "registry/store.py", "registry/migrations/__init__.py"}:
        for name, call in calls(path):
            last = name.rpartition(".")[2]
            bare = not call.args and not call.keywords  # Store.commit takes arguments, a connection's does not
            if last in {"begin_nested", "Session", "sessionmaker"} or (
                "." in name and bare and last in {"begin", "commit", "rollback"}
            ):
                found.append(f"{path}:{call.lineno} {name}")
        found += [f"{path} imports {name}" for name in taken_from(path, "sqlalchemy.orm") & {"Session", "sessionmaker"}]
    assert not found


def test_only_the_durable_room_moves_and_syncs_files() -> None:
    """`x.replace(y)` with one argument is a path's; a text's takes two, a date's takes keywords.

    The demo's live part plays a trainer, who renames a file into the inbox from outside.
    """
    found = []
    for path in TREES.keys() - {"daemon/disk/durable.py", "daemon/demo/live.py"}:
        for name, call in calls(path):
            last = name.rpartition(".")[2]
            replaces = "." in name and last == "replace" and len(call.args) == 1 and not call.keywords
            if name.startswith("durable."):  # the room's own verbs
                continue
            if name in DURABLE_CALLS or ("." in name and last in DURABLE_METHODS) or replaces:
                found.append(f"{path}:{call.lineno} {name}")
        for module in ("os", "fcntl", "shutil"):
            found += [f"{path} imports {n}" for n in taken_from(path, module) if f"{module}.{n}" in DURABLE_CALLS]
    assert not found


def test_only_the_metrics_room_declares_metrics() -> None:
    found = []
    for path in TREES.keys() - {"daemon/metrics.py"}:
        found += [f"{path} imports {name}" for name in taken_from(path, "prometheus_client") & METRICS]
        found += [
            f"{path}:{call.lineno}" for name, call in calls(path) if name in {f"prometheus_client.{m}" for m in METRICS}
        ]
    assert not found


def test_the_projector_knows_no_path_clock_logger_or_database() -> None:
    found = []
    for path in TREES:
        if path.startswith("projector/"):
            for name in imported(path):
                top = name.split(".")[0]
                if top in NOT_IN_PROJECTOR or path not in (ONLY_THERE.get(top, path),):
                    found.append(f"{path} imports {name}")
    assert not found


def unpickling(tree: ast.AST) -> list[str]:
    """What in a source could unpickle, or run what is in a file: imports, loaders by any name, text that is run."""
    found: list[str] = []
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in UNPICKLERS]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [f"{node.module}.{alias.name}" for alias in node.names if _loads(f"{node.module}.{alias.name}")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            name = f"{names.get(first, first)}.{rest}"
            found += [name] if _loads(name) else []
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in {"__import__", "eval", "exec", "compile"}:
                found.append(name)
            if name == "getattr" and dotted(node.args[0]).split(".")[0] in {*names, "torch", "numpy"}:
                named = node.args[1].value if isinstance(node.args[1], ast.Constant) else "load, for all one knows"
                found += [f"getattr {named}"] if "load" in str(named) else []
            found += [f"{name} {word.arg}" for word in node.keywords if word.arg in {"allow_pickle", "weights_only"}]
    return found


def _loads(name: str) -> bool:
    """True for a module, function or class, by its full name, that unpickles."""
    parts = name.replace("np.", "numpy.").split(".")
    loader = "load" in parts[-1] or "unpickle" in parts[-1].lower() or parts[-1] == "PickleType"
    of_theirs = parts[0] in {"torch", "numpy", "pandas", "sqlalchemy"} and parts[1:2] != ["utils"]
    return parts[0] in UNPICKLERS or (loader and of_theirs)


UNPICKLERS = {
    *("pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "copyreg"),
    *("multiprocessing", "concurrent.futures.process", "yaml", "jsonpickle", "runpy", "code"),
}
UNPICKLES = "daemon/convert/unpickling.py"
KNOWN = {"daemon/versions/writing.py": ["getattr load, for all one knows"]}  # a dtype by its name, one of a closed list


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import marshal, json",
        "import shelve",
        "from joblib import load",
        "import torch\ntorch.load(p, weights_only=True)",
        "import torch as t\nt.load(p)",
        "from torch import load as read",
        "from torch import serialization\nserialization.load(p)",
        "import torch\nread = torch.load",
        "import torch\ntorch.jit.load(p)",
        "from torch.jit import load",
        "import torch\ntorch.hub.load_state_dict_from_url(u)",
        "import numpy as np\nnp.load(p, allow_pickle=True)",
        "import numpy\nnumpy.load(p)",
        "import torch\ngetattr(torch, 'load')(p)",
        "import torch\ngetattr(torch, word)(p)",
        "__import__('pickle')",
        "exec(text)",
        "from sqlalchemy import PickleType",
    ],
)
def test_whatever_unpickles_would_be_found(source: str) -> None:
    assert unpickling(ast.parse(source))


def test_only_one_file_unpickles() -> None:
    found = {path: what for path, tree in TREES.items() if (what := unpickling(tree)) != KNOWN.get(path, [])}
    assert set(found) == {UNPICKLES}, found
    assert found[UNPICKLES].count("torch.load") == 1


def test_what_unpickles_is_only_ever_a_process() -> None:
    """Nobody imports it, and only the file that starts the process knows its name."""
    name = module_name(UNPICKLES)
    assert not [path for path in TREES if name in set(imported(path))]
    knows = [
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in {name, f"{name}:main", name.rpartition(".")[2]}
    ]
    assert knows == ["daemon/convert/confining.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_error_carries_reason_and_hint(room: str) -> None:
    module = importlib.import_module(f"{room}.errors")
    reasons = module.Reason
    errors = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(errors) > 3
    for error in errors:
        if (
            Exception in error.__bases__
            and "reason" not in inspect.signature(error).parameters
            and "reason" not in vars(error)
        ):
            continue  # the root of a tree whose leaves each have their own reason: it is never raised
        takes_reason = "reason" in inspect.signature(error).parameters
        raised = error(*([next(iter(reasons))] if takes_reason else []), "what is wrong", "what to do")
        assert isinstance(raised.reason, reasons), error
        assert raised.hint == "what to do", error
        assert str(raised) == "what is wrong", error


def test_the_reasons_of_the_three_rooms_are_one_closed_list() -> None:
    words = [reason.value for room in ROOMS for reason in importlib.import_module(f"{room}.errors").Reason]
    assert len(words) == len(set(words))
    assert all(word.replace("_", "").isalpha() and word.islower() for word in words)
