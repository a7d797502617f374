"""Where everything is under HOME. Only names: nothing here touches the disk except `exists`.

HOME/
  mainstem.toml
  inbox/                   where experts are dropped; others may write in it
  quarantine/000017/       reason.json and what was refused
  archive/000016/          what was merged (or was a duplicate)
  published/main/000012/   one folder per version; adapter/ in it where one is asked for
  published/main/latest -> 000012      and the plain file LATEST
  state/
    registry.sqlite  lock  clean
    in-hand  attempts.json   what is being worked on; what was tried in vain
    daemon.json            what the running daemon says of itself
    order.json             what a person told the daemon: to pause, or to drain
    base/                  the base itself, copied when the home was made
    heads/main/000012/state.safetensors
    heads/main/views/000012.safetensors      what the method keeps of the expert that version 12 folded
    evaluations/main/000012.log      what the evaluator wrote of a version
    uploads/               what is still being sent over HTTP
    requests/              what commands ask of the running daemon
    tmp/
    rebuild-main/  without-000013/       homes in this home, while a rebuild is on its way
    learning-main.safetensors            coefficients, while they are learned
"""

from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"
CARD = "README.md"
COEFFICIENTS = "adamerging.json"  # beside weights whose coefficients were learned
ADAPTER_FOLDER = "adapter"
STATE_FILE = "state.safetensors"
REASON_FILE = "reason.json"  # why an expert was refused, beside it
DROPPED_REASON_FILE = f"{REASON_FILE}.dropped"  # what a drop is called there that was itself called so
BY_ITSELF = "by-itself"  # no head is called so
PREPARED_FILE = "prepared.safetensors"
PREPARED_DIGEST = "prepared.sha256"


def is_head_name(name: str) -> bool:
    """True for what a head may be called: its folders are named after it."""
    return name.isascii() and name.isidentifier()


def is_weights(name: str) -> bool:
    """True for the merged weights and their index; those of a module in a folder of its own are the base's."""
    return ".safetensors" in name and "/" not in name


def is_adapter(name: str) -> bool:
    """True for a file of a version, as its manifest names it, that belongs to the LoRA adapter beside its weights."""
    return name.startswith(f"{ADAPTER_FOLDER}/")


def number(n: int) -> str:
    """A version or an expert id as its folder is called: 12 -> "000012"."""
    return f"{n:06d}"


@dataclass(frozen=True)
class Home:
    """The folder layout of one HOME."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "mainstem.toml"

    @property
    def inbox(self) -> Path:
        return self.root / "inbox"

    @property
    def uploads(self) -> Path:
        """What is still being sent over HTTP. Not in the inbox: others may write there, and put a link in its place."""
        return self.state / "uploads"

    @property
    def old_uploads(self) -> Path:
        """Where uploads lay once."""
        return self.inbox / ".uploads"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def registry(self) -> Path:
        return self.state / "registry.sqlite"

    @property
    def lock(self) -> Path:
        return self.state / "lock"

    @property
    def clean(self) -> Path:
        """Present only after a clean stop: without it the next start re-hashes the live version."""
        return self.state / "clean"

    @property
    def in_hand(self) -> Path:
        """Which entry of the inbox is being worked on."""
        return self.state / "in-hand"

    @property
    def presence(self) -> Path:
        """What the running daemon says of itself."""
        return self.state / "daemon.json"

    @property
    def order(self) -> Path:
        """What a person told the daemon: to pause, or to finish the queue and stop."""
        return self.state / "order.json"

    @property
    def requests(self) -> Path:
        """What commands ask of the running daemon, and its answers."""
        return self.state / "requests"

    @property
    def attempts(self) -> Path:
        """Which entries of the inbox were tried in vain, and how often."""
        return self.state / "attempts.json"

    @property
    def founding(self) -> Path:
        """Present while the home is being made: only then may `init` start over in its folder."""
        return self.state / ".founding"

    @property
    def base(self) -> Path:
        return self.state / "base"

    @property
    def tmp(self) -> Path:
        return self.state / "tmp"

    @property
    def published(self) -> Path:
        return self.root / "published"

    def quarantine(self, expert_id: int) -> Path:
        return self.root / "quarantine" / number(expert_id)

    def archive(self, expert_id: int) -> Path:
        return self.root / "archive" / number(expert_id)

    def archived(self, expert_id: int) -> Path | None:
        """A merged expert's file or folder, whatever its name is; None where somebody took it away."""
        folder = self.archive(expert_id)
        return next(iter(sorted(folder.iterdir())), None) if folder.is_dir() else None

    def quarantined(self, expert_id: int) -> list[Path]:
        """A refused expert's file or folder; none where somebody took it away, and more where somebody added to it."""
        folder = self.quarantine(expert_id)
        return sorted(path for path in folder.iterdir() if path.name != REASON_FILE) if folder.is_dir() else []

    def versions(self, head: str) -> Path:
        return self.published / head

    def version(self, head: str, n: int) -> Path:
        return self.published / head / number(n)

    def manifest(self, head: str, n: int) -> Path:
        return self.version(head, n) / MANIFEST

    def latest(self, head: str) -> Path:
        return self.published / head / "latest"

    def states(self, head: str) -> Path:
        return self.state / "heads" / head

    def head_state(self, head: str, n: int) -> Path:
        """The folder with the accumulators of one version (none for version 0)."""
        return self.states(head) / number(n)

    def views(self, head: str) -> Path:
        """The folder with what the head's method keeps of each expert; only methods that do have one."""
        return self.states(head) / "views"

    def view_record(self, head: str, n: int) -> Path:
        """What is kept of the expert that version n folded; it outlives the version's own files."""
        return self.views(head) / f"{number(n)}.safetensors"

    def prepared(self, head: str, n: int) -> Path:
        """What a head's method prepared from version n for the next expert: derived, may be missing."""
        return self.head_state(head, n) / PREPARED_FILE

    def rebuilding(self, head: str) -> Path:
        """A home of its own, in which a head that is to be added is rebuilt."""
        return self.state / f"rebuild-{head}"

    def learning(self, head: str) -> Path:
        """How far the coefficients of a head are learned."""
        return self.state / f"learning-{head}.safetensors"

    def withdrawing(self, n: int) -> Path:
        """A home of its own, in which what version n needs is merged again without the experts that go with it."""
        return self.state / f"without-{number(n)}"

    def evaluation_log(self, head: str, n: int) -> Path:
        """What the evaluator wrote when it scored a version; of the head BY_ITSELF, the expert that came with it."""
        return self.state / "evaluations" / head / f"{number(n)}.log"

    @property
    def inner_mark(self) -> Path:
        """In a home inside of another: what says that a rebuild made it, and may remove it."""
        return self.root / ".mainstem-rebuild"

    def exists(self) -> bool:
        return self.registry.is_file()
