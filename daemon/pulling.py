"""Fetches a version from a running mainstem into a folder: all of it, each file checked, or nothing."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen
from uuid import uuid4

from daemon import durable
from daemon.errors import DaemonError, Reason
from daemon.home import MANIFEST
from projector.text import shown

WEIGHTS = "model.safetensors"
CHUNK_BYTES = 1 << 20
TIMEOUT_SECONDS = 300  # without a byte; a view may take a sweep over a large model before its first
MANIFEST_BYTES = 16 << 20

Report = Callable[[str, int, int], None]
"""Hears of each piece: the file's name, the bytes of it that are there, and its size."""


@dataclass(frozen=True)
class Pulled:
    """What was fetched."""

    head: str
    version: int
    files: int
    size_bytes: int


def pull(
    url: str,
    dest: Path,
    head: str = "main",
    version: str = "latest",
    view: str | None = None,
    report: Report | None = None,
) -> Pulled:
    """Makes the folder `dest` out of a version, or of an expert's view of it, at once and durably.

    Every file is held against the manifest's sha256; a view's weights have none, and are held against their own header.
    Raises DaemonError where the server has it not, cannot be reached or sent something else.
    """
    dest = dest.absolute()
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise DaemonError(Reason.PULL, f"{dest} is there already", "name a folder that does not exist, or is empty")
    if not _is_address(url):
        raise DaemonError(Reason.PULL, f"{url} is no address", "for example http://127.0.0.1:8765")
    line = f"{url.rstrip('/')}/v1/heads/{quote(head, safe='')}"
    text, manifest = _manifest(
        f"{line}/latest" if version == "latest" else f"{line}/versions/{quote(version, safe='')}"
    )
    number = manifest["version"]
    fetched = _Fetched(dest.with_name(f".{dest.name}.{uuid4().hex}.tmp"), report or (lambda *_: None))
    try:
        durable.make_folder(fetched.folder)
        for name, (size, sha256) in _listed(manifest).items():
            if view is None or ".safetensors" not in name:
                fetched.file(f"{line}/versions/{number}/files/{quote(name)}", name, size, sha256)
        if view is None:
            durable.write_file(fetched.folder / MANIFEST, text)
        else:
            fetched.file(f"{line}/versions/{number}/views/{quote(view, safe='')}/files/{WEIGHTS}", WEIGHTS)
            _check_header(fetched.folder / WEIGHTS)
        durable.sync_folder(fetched.folder)
        durable.rename(fetched.folder, dest)
    finally:
        durable.remove(fetched.folder)
    return Pulled(head, number, fetched.files, fetched.size_bytes)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.netloc)


class _Fetched:
    """The files fetched so far, in a folder beside the one they are for."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder = folder
        self.files = 0
        self.size_bytes = 0
        self._report = report

    def file(self, url: str, name: str, size: int | None = None, sha256: str | None = None) -> None:
        """Fetches one file; `size` and `sha256` where they are known beforehand."""
        with _asked(url) as answer:
            length = answer.headers["Content-Length"] or ""
            announced = int(length) if length.isdecimal() else -1
            if announced < 0 or size not in (None, announced):
                raise _wrong(name, f"it has {announced} bytes there, the manifest says {size}")
            digest, done = hashlib.sha256(), 0
            with durable.new_file(self.folder / name, announced) as fd:
                while chunk := answer.read(CHUNK_BYTES):
                    digest.update(chunk)
                    durable.write_at(fd, chunk, done)
                    done += len(chunk)
                    self._report(name, done, announced)
        if done != announced:
            raise _wrong(name, f"it ended after {done} of {announced} bytes")
        if sha256 not in (None, digest.hexdigest()):
            raise _wrong(name, "its sha256 is not the manifest's")
        self.files += 1
        self.size_bytes += done


def _manifest(url: str) -> tuple[bytes, Mapping[str, Any]]:
    """A version's manifest, as bytes and read."""
    with _asked(url) as answer:
        text = answer.read(MANIFEST_BYTES)
    try:
        manifest: Any = json.loads(text)
        int(manifest["version"])
        _listed(manifest)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DaemonError(Reason.PULL, f"{url} is no manifest", "is this the address of a mainstem?") from None
    return text, manifest


def _listed(manifest: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    """(size, sha256) of every file of a manifest. ValueError where a name could lead out of the folder."""
    files = {file["name"]: (int(file["size"]), str(file["sha256"])) for file in manifest["files"]}
    for name in files:
        if not name or Path(name).name != name or name.startswith(".") or not name.isprintable() or name == MANIFEST:
            raise ValueError(f"{shown(name)} cannot be the name of a file")
    return files


@contextmanager
def _asked(url: str) -> Iterator[HTTPResponse]:
    """The answer to a GET. Raises DaemonError with the server's own words where it has some."""
    try:
        with urlopen(Request(url, headers={"Accept-Encoding": "identity"}), timeout=TIMEOUT_SECONDS) as answer:
            yield answer
    except HTTPError as error:
        raise DaemonError(Reason.PULL, *_problem(url, error)) from None
    except (HTTPException, ConnectionError, TimeoutError) as error:
        raise _broken(url, error) from error
    except OSError as error:
        if error.errno is not None:
            raise  # of our own disk
        raise _broken(url, error) from error


def _problem(url: str, error: HTTPError) -> tuple[str, str]:
    """(what is wrong, hint) as the server said it."""
    with error:
        try:
            body = json.loads(error.read(CHUNK_BYTES))
            return f"{url}: {body['error']}", str(body["hint"])
        except (ValueError, KeyError, TypeError, OSError):
            return f"{url}: {error.code} {error.reason}", "is this the address of a mainstem?"


def _check_header(path: Path) -> None:
    """Raises BadFile where the file is not what its own header says."""
    from projector.tensorfile import TensorReader  # it brings torch

    with path.open("rb") as file:
        TensorReader(file.fileno())


def _wrong(name: str, what: str) -> DaemonError:
    return DaemonError(Reason.PULL, f"{name}: {what}", "try again; if it stays so, run `mainstem verify` on the server")


def _broken(url: str, error: Exception) -> DaemonError:
    return DaemonError(Reason.PULL, f"{url}: {error}", "is the daemon running, and is this its address? try again")
