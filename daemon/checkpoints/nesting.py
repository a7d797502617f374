"""Where in a dropped folder the checkpoint is: mostly the folder itself, else the one that a program keeps below it.

transformers' Trainer saves checkpoint-500/ into its output folder, huggingface_hub's cache keeps snapshots/REVISION/.
Where there is just one it is taken; where there are several, nobody has said which is the expert, and the hint does.
"""

import json
import os
import re
import stat
from collections.abc import Collection
from contextlib import ExitStack, suppress
from typing import Any

from daemon.checkpoints.adapter_config import ADAPTER
from daemon.checkpoints.expert_json import ABOUT
from daemon.checkpoints.hints import inner
from daemon.checkpoints.opening import open_entry
from daemon.checkpoints.weight_names import NOT_OF_A_MODEL, OF_A_MODEL, is_index
from daemon.errors import NotYet, Reason, Refused
from projector.text import NEW, listed

CHECKPOINT = re.compile(r"checkpoint-(\d+)")
TRAINER_STATE = "trainer_state.json"
MAX_STATE_BYTES = 64 << 20
SNAPSHOTS, REFS = "snapshots", "refs"
DEEPEST = 2  # how many folders below the one that was dropped: snapshots/REVISION


def checkpoint_in(fd: int, follow: bool, closing: ExitStack) -> tuple[int, str | None]:
    """The folder in which the checkpoint is that was dropped as the folder `fd`: itself, or the one at that path below.

    It is closed with `closing`. Raises Refused or NotYet where it is one of several.
    """
    names = os.listdir(fd)
    if _holds_weights(names):
        return fd, None
    if found := _with_weights(fd, [name for name in names if CHECKPOINT.fullmatch(name)], follow):
        if len(found) == len(_with_weights(fd, names, follow)):
            return _only(fd, found, names, follow, closing)
    elif SNAPSHOTS in names and _is_folder(fd, SNAPSHOTS):
        snapshots = open_entry(fd, SNAPSHOTS, follow, closing)
        if found := _with_weights(snapshots, os.listdir(snapshots), follow):
            return _snapshot(fd, snapshots, found, follow, closing)
    return fd, None


def _only(fd: int, found: list[str], names: Collection[str], follow: bool, closing: ExitStack) -> tuple[int, str]:
    """A Trainer's only checkpoint, once its training is over."""
    found.sort(key=lambda name: int(name.removeprefix("checkpoint-")))
    last = open_entry(fd, found[-1], follow, closing)
    state = _json(last, TRAINER_STATE, follow)
    best = os.path.basename(str(state.get("best_model_checkpoint") or ""))  # noqa: PTH119 - of another machine
    if len(found) > 1:
        which, why = (best, f"the best by its {TRAINER_STATE}") if best in found else (found[-1], "the last")
        raise NotYet(
            Reason.NO_WEIGHTS,
            f"it holds {len(found)} checkpoints and no model of its own: {listed(found)}",
            f"drop one of them as a folder of its own, such as {why}: `cp -r {inner(which)} {NEW}`",
        )
    if ABOUT in names:
        raise NotYet(
            Reason.NO_WEIGHTS,
            f"{ABOUT} is not beside the weights, which are in {found[0]}",
            f"move it in there, then `cp -r {inner(found[0])} {NEW}`",
        )
    done, steps = state.get("global_step"), state.get("max_steps")
    if isinstance(done, int) and isinstance(steps, int) and done < steps:
        raise NotYet(
            Reason.INCOMPLETE,
            f"its training is at step {done} of {steps}, by {found[0]}/{TRAINER_STATE}",
            "save the model once it is trained; if this is it, drop that as a folder of its own: "
            f"`cp -r {inner(found[0])} {NEW}`",
        )
    return last, found[0]


def _snapshot(fd: int, snapshots: int, found: list[str], follow: bool, closing: ExitStack) -> tuple[int, str]:
    """The only revision in a folder of huggingface_hub's cache."""
    if len(found) == 1:
        return open_entry(snapshots, found[0], follow, closing), f"{SNAPSHOTS}/{found[0]}"
    main = ""
    with suppress(OSError, Refused, NotYet), ExitStack() as reading:
        ref = open_entry(open_entry(fd, REFS, follow, reading), "main", follow, reading)
        main = os.pread(ref, 200, 0).decode(errors="replace").strip()
    which, why = (main, "such as main") if main in found else (found[-1], "whichever was trained")
    raise NotYet(
        Reason.NO_WEIGHTS,
        f"it is a cache with {len(found)} revisions: {listed(found)}",
        f"drop one of them, {why}: `cp -rL {inner(f'{SNAPSHOTS}/{which}')} {NEW}`",
    )


def _holds_weights(names: Collection[str]) -> bool:
    """True for a folder that is a model or an adapter, or one of which the weights are on their way."""
    return ADAPTER in names or any(
        is_index(name)
        or (name.endswith(OF_A_MODEL) and name not in NOT_OF_A_MODEL and not name.startswith((".", "rng_state")))
        for name in names
    )


def _with_weights(fd: int, names: Collection[str], follow: bool) -> list[str]:
    """Those of the names that are folders with weights."""
    found = []
    for name in names:
        with suppress(OSError, Refused, NotYet), ExitStack() as looking:
            if _is_folder(fd, name) and _holds_weights(os.listdir(open_entry(fd, name, follow, looking))):
                found.append(name)
    return sorted(found)


def _is_folder(fd: int, name: str) -> bool:
    with suppress(OSError):
        return stat.S_ISDIR(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode)
    return False


def _json(fd: int, name: str, follow: bool) -> dict[str, Any]:
    """What a JSON file says, if it is there and is an object."""
    with suppress(OSError, Refused, NotYet, ValueError, RecursionError), ExitStack() as reading:
        content = json.loads(os.pread(open_entry(fd, name, follow, reading), MAX_STATE_BYTES, 0))
        return content if isinstance(content, dict) else {}
    return {}
