"""The names under which other programs write what is not finished yet: downloads, copies, synchronised folders.

An entry of the inbox with such a name does not count. A few programs write under the last name at once, at its full
length, and lay a note beside it as long as they are at it: then what the note is about waits (`noted`). Inside of a
folder fewer names tell (`unfinished`): what is hidden, locks and an editor's backups lie there for good.
"""

import re
from collections.abc import Collection, Iterable

from projector.text import shown

_EXTENSIONS = "safetensors|bin|pt|pth|ckpt|gguf|json|jsonl|txt|model|md|jinja|msgpack|h5|onnx|npz|zip|tar|gz"
_SUFFIXES = r"""
      \.(tmp|part|partial|incomplete|filepart|ytdl|part\.minio) # wget2, rclone, huggingface_hub, WinSCP, yt-dlp, MinIO
    | \.(crdownload|opdownload|download|crswap|fdmdownload)     # Chromium, Opera, Safari, Free Download Manager
    | \.(aria2|aria2__temp|lftp-pget-status)                    # notes beside what aria2 and lftp write
    | \.(!ut|!qb|!sync|bc!)                                     # BitTorrent, Resilio
    | _\.gstmp                                                  # gsutil, gcloud storage
"""
UNFINISHED = re.compile(
    rf"""
      .*({_SUFFIXES})
    | .*\.tmp[a-z0-9_]{{6,8}}                                   # safetensors' and tempfile's
    | .*\.({_EXTENSIONS})\.(?!\d{{8}}\Z)[0-9a-f]{{8}}           # boto3, aws s3 cp; a date is a person's
    | \..+\.({_EXTENSIONS})\.(?-i:(?![a-z]{{6}}\Z)[a-zA-Z0-9]{{6}}) # rsync; a word is a person's
    | \.in\..+                                                  # lftp
    | \.azdownload-.+                                           # azcopy
    | \..+\.~[0-9a-f]+                                          # Nextcloud and ownCloud
    | \.getxfer\..+                                             # MEGA
    | tmp_pack_[a-z0-9]{{6}}                                    # git
    | tmp-checkpoint-\d+                                        # transformers' Trainer
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
TEMPORARY = re.compile(
    rf"""
      \..*                                                      # hidden: rsync's, Syncthing's, NFS's, and many more
    | .*(\.lock|\.swp|~)
    | \~syncthing\~.*
    | {UNFINISHED.pattern}
    """,
    UNFINISHED.flags,
)
NOTE = re.compile(rf"(?P<about>.+?)({_SUFFIXES}|\.st)", UNFINISHED.flags)  # .st: axel's
IN_FOLDERS = re.compile(
    r"(.*/)?(\.~tmp~|\.rsync-partial|\._____temp|\.git/lfs/incomplete)/.+"  # rsync, ModelScope, git-lfs
    r"|(.*/)?\.git/(index|shallow)\.lock",
    re.DOTALL,
)


def noted(names: Iterable[str]) -> dict[str, str]:
    """Which of the names in one folder are still being written, as a note beside them says: name -> the note's."""
    there = set(names)
    notes = ((match["about"], name) for name in there if (match := NOTE.fullmatch(name)))
    return {about: note for about, note in sorted(notes) if about in there}


def unfinished(paths: Collection[str]) -> str | None:
    """The first of the paths in a folder, as they are called from there, that tells that it is not finished."""
    told = [path for path in paths if UNFINISHED.fullmatch(path.rpartition("/")[2]) or IN_FOLDERS.fullmatch(path)]
    if notes := [path for path in paths if path.endswith(".st")]:
        there = set(paths)
        told += [note for note in notes if note.removesuffix(".st") in there]
    return min(told, default=None)


def said_by(path: str) -> str:
    """What a path tells that says so."""
    return f"{shown(path)} says that it is not finished"


def hint_for(path: str) -> str:
    """What to do about a path that tells so."""
    return f"nothing, while it is on its way; if that was broken off, finish it, or remove {shown(path)}"
