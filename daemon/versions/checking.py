"""A version as it lies on the disk: which files it has, and whether they are what its manifest says."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath

from daemon.layout import MANIFEST, STATE_FILE, Home
from daemon.manifest import FileEntry, Manifest
from registry.records import Version

HASH_BYTES = 8 << 20


def names_below(folder: Path) -> list[str]:
    """Every file in a folder and in those below it, as manifests name them: "1_Pooling/config.json". Sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def entry(path: Path, name: str | None = None, read: Callable[[int], object] = lambda _: None) -> FileEntry:
    """Hashes a file as it is on the disk. name: as the manifest has it, where that is not the file's own. `read` hears
    of the bytes as they are read, and may raise to end it.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES):
            digest.update(chunk)
            read(len(chunk))
    return FileEntry(name or path.name, path.stat().st_size, digest.hexdigest())


def problems(
    home: Home,
    version: Version,
    *,
    hashes: bool,
    extras: bool = True,
    state: bool = True,
    read: Callable[[int], object] = lambda _: None,
) -> list[str]:
    """What is wrong with a version's files, in words; nothing where they are as they were committed.

    Sizes are always compared; `hashes` reads every byte; `extras` also names files that do not belong; without `state`
    that may be gone. The manifest itself is held against the registry. `read` hears of the bytes that are hashed, and
    may raise to end it.
    """
    folder = home.version(version.head, version.number)
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        return [f"{_relative(home, path)}: {error.strerror}"]
    read(len(text))
    try:
        manifest = Manifest.read(text, version.manifest_sha256)
    except ValueError:
        return [f"{_relative(home, path)}: its sha256 is not the registry's"]
    expected = [(folder / file.name, file) for file in manifest.files.values()]
    kept = home.head_state(version.head, version.number) / STATE_FILE
    if manifest.state and (state or kept.exists()):
        expected.append((kept, manifest.state))
    if manifest.record:
        expected.append((home.view_record(version.head, version.number), manifest.record))
    found = [_problem(home, path, file, hashes, read) for path, file in expected]
    listed = {MANIFEST, *manifest.files}
    extra = [f"{_relative(home, folder / name)}: not in the manifest" for name in _unlisted(folder, listed)]
    return [problem for problem in found if problem] + (extra if extras else [])


def _unlisted(folder: Path, listed: Collection[str]) -> list[str]:
    """What is in a folder, or in one below it, and neither listed nor a folder on the way to what is."""
    expected = {*listed, *(str(above) for name in listed for above in PurePosixPath(name).parents)}
    return sorted({path.relative_to(folder).as_posix() for path in folder.rglob("*")} - expected)


def _problem(home: Home, path: Path, file: FileEntry, hashes: bool, read: Callable[[int], object]) -> str | None:
    try:
        size = path.stat().st_size
        if size != file.size:
            return f"{_relative(home, path)}: {size} bytes, the manifest says {file.size}"
        if hashes:
            found = entry(path, read=read)
            if found.sha256 != file.sha256:
                return f"{_relative(home, path)}: its sha256 is not the manifest's"
    except OSError as error:
        return f"{_relative(home, path)}: {error.strerror}"
    return None


def _relative(home: Home, path: Path) -> str:
    return str(path.relative_to(home.root))
