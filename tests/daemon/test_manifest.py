"""A version's manifest, read again: what it says counts where it is the one that was committed."""

import hashlib
import json
from pathlib import Path

import pytest

from daemon.layout import Home
from daemon.manifest import FileEntry, Manifest
from tests.daemon.homes import drain, put
from tests.models import write_expert


def test_what_is_written_is_what_is_read(home: Home, base: Path, tmp_path: Path) -> None:
    put(home, write_expert(tmp_path / "e.safetensors", base, 2))
    drain(home)
    raw = home.manifest("main", 1).read_bytes()
    found = Manifest.read(raw, hashlib.sha256(raw).hexdigest())
    assert found.raw == raw and found.content == json.loads(raw) and found.record is None
    folder, state = home.version("main", 1), home.head_state("main", 1)
    assert found.files and found.state
    for path, file in [
        *((folder / name, file) for name, file in found.files.items()),
        (state / "state.safetensors", found.state),
    ]:
        data = path.read_bytes()
        assert (
            file == FileEntry(file.name, len(data), hashlib.sha256(data).hexdigest())
            and path.name == Path(file.name).name
        )


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b'{"files": 3}', b'{"files": [{"name": "a"}]}'])
def test_what_is_no_manifest_is_a_value_error(raw: bytes) -> None:
    with pytest.raises(ValueError):
        Manifest.read(raw, hashlib.sha256(raw).hexdigest())


def test_another_than_the_one_that_was_committed_is_not_read() -> None:
    with pytest.raises(ValueError, match="committed"):
        Manifest.read(b'{"files": []}', "0" * 64)
