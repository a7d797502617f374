"""Each hostile file through the reader and the schema check: the named reason, a printable message, bounded memory."""

import tempfile
import tracemalloc

import pytest
import torch

from projector.errors import BadFile, BadSchema, ProjectorError
from projector.files.header import MAX_HEADER_BYTES
from projector.files.tensorfile import RunningDigest, TensorReader
from projector.spec import TensorSpec, check_schema
from tests.attacks.builders import BUILDERS, ODD_NAMES

BASE = {name: TensorSpec(name, (2,), torch.float32) for name in ("layer.weight", "layer.bias")}

# Small objects are the costliest JSON per byte: about 30 bytes of memory each. A header of MAX_HEADER_BYTES thus costs
# half a gibibyte at the worst.
MEMORY_PER_BYTE = 40


def refusal(data: bytes) -> ProjectorError:
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(ProjectorError) as caught:
            check_schema(BASE, TensorReader(file.fileno(), RunningDigest(file.fileno())).specs)
    return caught.value


@pytest.mark.parametrize("name", BUILDERS)
def test_attack(name: str) -> None:
    build, reasons = BUILDERS[name]
    data = build()
    error = refusal(data)
    assert error.reason in reasons
    assert isinstance(error, BadSchema if name in ODD_NAMES else BadFile)
    for text in (str(error), error.hint):
        assert text.isprintable(), ascii(text)
        assert 0 < len(text) <= 1000, len(text)


@pytest.mark.parametrize("name", [name for name in BUILDERS if len(BUILDERS[name][0]()) > 1 << 19])
def test_memory_is_bounded(name: str) -> None:
    data = BUILDERS[name][0]()
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        tracemalloc.start()
        try:
            with pytest.raises(ProjectorError):
                check_schema(BASE, TensorReader(file.fileno()).specs)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    print(f"{name}: {len(data) / 2**20:.1f} MiB of file, {peak / 2**20:.1f} MiB of memory")
    assert peak <= MEMORY_PER_BYTE * len(data) + (1 << 20)
    if len(data) > 2 * MAX_HEADER_BYTES:
        assert peak < 1 << 20, "a header over the limit is not read at all"


def test_every_reason_is_one_of_the_two_enums() -> None:
    from daemon.errors import Reason as DaemonReason
    from projector.errors import Reason

    words = {*Reason, *DaemonReason}
    assert all(reasons <= words for _, reasons in BUILDERS.values())
    assert len(BUILDERS) > 90
