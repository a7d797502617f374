"""What a reader can copy to get a version: each command works as it stands."""

import json
import re
import shlex
from collections.abc import Sequence
from urllib.parse import quote

from daemon.http.answers import Problem
from daemon.http.files import Published
from daemon.layout import is_adapter
from daemon.manifest import Manifest
from daemon.notation import called
from registry.records import Head, Version

PLAIN = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)  # names without a letter that a shell or curl takes as its own
CONFIG_BYTES = 1 << 20
MOST_NAMES = 50  # files in one command of curl
_CLASS = re.compile(r"[A-Z][A-Za-z0-9]{0,99}")

Commands = Sequence[tuple[str, str]]
"""What each is for, and the command."""


def curl(address: str, names: Sequence[str]) -> str:
    """The command that fetches these files from below an address, each under its own name, folders and all."""
    if all(PLAIN.fullmatch(name) for name in names):
        listed = names[0] if len(names) == 1 else "{" + ",".join(names) + "}"
        named = f"-o {names[0]}" if len(names) == 1 else "-o '#1'"
        return f"curl -fL --create-dirs {named} '{address}/{listed}'"
    pairs = " ".join(f"-o {shlex.quote(name)} '{address}/{quote(name)}'" for name in names)
    return f"curl -fL --create-dirs --globoff {pairs}"


def commands(published: Published, head: Head, version: Version, origin: str) -> Commands:
    """How to get a version: nothing where its files are gone or damaged."""
    try:
        manifest = published.manifest(head, version)
    except Problem:
        return []  # the page must come up on a damaged home too; readiness says what is wrong
    n, found = version.number, []
    folder = f"{head.name}-{n}"
    if origin.startswith("http"):
        found.append(
            ("Fetch it, checked and all at once", f"mainstem pull {origin} {folder} --version {called(head.name, n)}")
        )
    names = [name for name in manifest.files if not is_adapter(name)]
    if len(names) <= MOST_NAMES:
        address = f"{origin}/v1/heads/{quote(head.name, safe='')}/versions/{n}/files"
        found.append(("Download it into the current folder", curl(address, names)))
    architecture = _architecture(published, head, version, manifest)
    if "config.json" in manifest.files:
        loader = architecture or "AutoModel"
        found.append(("Load what was fetched, with transformers", f"{loader}.from_pretrained({folder!r})"))
    if architecture and architecture.endswith("ForCausalLM"):
        found.append(("Serve what was fetched, with vLLM", f"vllm serve ./{folder} --served-model-name {head.name}"))
    return found


def local_command(published: Published, head: Head) -> Commands:
    """How to load what is live on this machine, where transformers can."""
    try:
        manifest = published.manifest(head, published.version(head, head.live))
    except Problem:
        return []
    if "config.json" not in manifest.files:
        return []
    home = published.home
    # Not the whole path: the page may be read by many, and where things lie on this machine is nobody's business.
    latest = str(home.latest(head.name).absolute().relative_to(home.root.absolute().parent))
    where = "Load what is live on this machine, from the folder that the home is in"
    return [(where, f"AutoModel.from_pretrained({latest!r})")]


def _architecture(published: Published, head: Head, version: Version, manifest: Manifest) -> str | None:
    """The class that config.json names."""
    entry = manifest.files.get("config.json")
    if entry is None or entry.size > CONFIG_BYTES:
        return None
    try:
        first = json.loads(published.read(head, version, entry, CONFIG_BYTES))["architectures"][0]
    except (Problem, OSError, ValueError, LookupError, TypeError):
        return None
    return first if isinstance(first, str) and _CLASS.fullmatch(first) else None
