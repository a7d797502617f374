"""Who may read and write the home."""

import os
import pwd
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from daemon.config import Settings
from daemon.doctor.finding import Finding, bad, ok, warn
from daemon.layout import Home
from projector.text import listed


def check(folder: Path, home: Home | None, settings: Settings | None) -> Iterator[Finding]:
    """folder: where the home is, or will be."""
    if home is None:
        writable = os.access(folder, os.W_OK | os.X_OK)
        who = _name(os.geteuid())
        text = f"{folder} can{'' if writable else 'not'} be written by {who}"
        yield ok("permissions", text) if writable else bad("permissions", text, f"chown {who} {folder}")
        return
    yield _writable(home)
    yield _owned(home)
    yield _private(home)
    if settings and settings.http.write_token_file:
        yield _secret("write token", home.root / settings.http.write_token_file, "http.write_token_file")
    for webhook in settings.webhooks if settings else ():
        if webhook.secret_file:
            yield _secret("webhook secret", home.root / webhook.secret_file, f"secret_file of {webhook.url}")


def _writable(home: Home) -> Finding:
    parts = [home.root, *_parts(home)]
    closed = [path.name for path in parts if not os.access(path, os.R_OK | os.W_OK | os.X_OK)]
    if closed:
        text = f"{_name(os.geteuid())} cannot write in {listed(closed)}"
        owner = _name(home.state.stat().st_uid)
        return bad("permissions", text, f"run mainstem as {owner}, who owns the state; or chown the home")
    return ok("permissions", f"{_name(os.geteuid())} can write in all of its folders")


def _owned(home: Home) -> Finding:
    """Somebody who ran a command as another user, root most likely, left files that the daemon cannot replace."""
    owner = home.state.stat().st_uid
    folders = [home.state, *_parts(home), *(path for path in home.published.glob("*") if not path.is_symlink())]
    here = [entry for folder in folders for entry in _entries(folder) if folder != home.inbox]
    others = sorted({path.name for path in [*folders, *here] if path != home.inbox and path.lstat().st_uid != owner})
    if others:
        who = _name(owner)
        return warn("owner", f"not owned by {who}: {listed(others, most=5)}", f"chown -R {who} {home.root}")
    return ok("owner", f"all belongs to {_name(owner)}")


def _private(home: Home) -> Finding:
    open_to = [path.name for path in (home.state, home.published) if path.stat().st_mode & stat.S_IWOTH]
    if open_to:
        text = f"anybody may write in {listed(open_to)}"
        return bad("private", text, f"chmod o-w {' '.join(str(home.root / name) for name in open_to)}")
    return ok("private", "others write in the inbox at the most")


def _secret(name: str, path: Path, setting: str) -> Finding:
    """A file that a setting names, which nobody but its owner should read."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return bad(name, f"{path}: {error.strerror}", f"put the {name} there, or unset {setting}")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        return warn(name, f"others than its owner may read {path}", f"chmod 600 {path}")
    return ok(name, "only its owner may read it")


def _parts(home: Home) -> Sequence[Path]:
    parts = (home.inbox, home.root / "archive", home.root / "quarantine", home.published, home.state)
    return [path for path in parts if path.exists()]


def _entries(folder: Path) -> Sequence[Path]:
    return list(folder.iterdir()) if folder.is_dir() and os.access(folder, os.R_OK) else []


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:  # no name in a container
        return str(user)
