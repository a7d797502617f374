"""For whoever trains: writes the expert.json that says what an expert is and which version it was trained from.

    Trainer(..., callbacks=[mainstem_callback(task="legal German")])
    write_expert_json("german", start="base", task="legal German")

It needs huggingface_hub alone, so that this one file can be copied to where models are trained; transformers is
imported where the callback is made. docs/trainers.md has it in use.
"""

import json
import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

EXPERT_JSON = "expert.json"
NAMESPACE = "mainstem"  # of every repository of the daemon's
COMMIT = "[0-9a-f]{40}"
SAY_SO = 'say trained_from="init/3" instead, with the head and the version that it was'

log = logging.getLogger(__name__)


class NotTold(ValueError):
    """It cannot be told which version a model is."""


def version_of(start: str | Path) -> str:
    """The version that a model is, as `init/3`, by the folder that it was loaded from: one that `mainstem pull` made,
    one that `snapshot_download` returned (then the daemon is asked, at HF_ENDPOINT), or a checkpoint that itself has an
    expert.json. Raises NotTold.
    """
    folder = Path(start).resolve()
    if not folder.is_dir():
        hint = f'load what snapshot_download("{NAMESPACE}/init") returns, or {SAY_SO}'
        raise NotTold(f"{start} is no folder, and a name means another version from time to time: {hint}")
    head, version = _field(folder / "manifest.json", "head"), _field(folder / "manifest.json", "version")
    if isinstance(head, str) and isinstance(version, int):
        return f"{head}/{version}"
    if (earlier := _field(folder / EXPERT_JSON, "trained_from")) is not None:
        return str(earlier)
    cached = re.search(rf"/models--{NAMESPACE}--([^/]+)/snapshots/({COMMIT})$", folder.as_posix())
    if cached is None:
        raise NotTold(f"nothing in {start} says which version it is: let `mainstem pull` make it, or {SAY_SO}")
    return _asked(cached[1], cached[2])


def write_expert_json(
    folder: str | Path, *, start: str | Path | None = None, trained_from: str | None = None, **about: Any
) -> Path:
    """Writes expert.json into a checkpoint, over one that is there; its path.

    start: the folder of the model that training began with; or trained_from: its version. about: the other fields, as
    docs/sidecars.md has them: name, task, weight, data, notes, ... Raises ValueError.
    """
    said = _said(trained_from or (version_of(start) if start is not None else None), about)
    return _write(Path(folder), said)


def mainstem_callback(*, start: str | Path | None = None, trained_from: str | None = None, **about: Any) -> Any:
    """A TrainerCallback that writes expert.json into what is saved at a step, and into `output_dir`, which is what is
    saved at the end and pushed. The arguments are those of `write_expert_json`.

    Where neither start nor trained_from is given, the model that training begins with is looked at; where that does
    not say which version it was, it is left out, with a warning. Raises ValueError.
    """
    from transformers import TrainerCallback

    given = trained_from or (version_of(start) if start is not None else None)
    _said(given, about)

    class MainstemCallback(TrainerCallback):
        """Its files are written by one process of several."""

        def __init__(self) -> None:
            self.trained_from = given
            self.looked = given is not None

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self._write(args.output_dir, state, model)

        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self._write(args.output_dir, state, model)
            step = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if step.is_dir():  # not in a search of hyperparameters, which puts a folder between
                self._write(step, state, model)

        def on_push_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self._write(args.output_dir, state, model)

        def _write(self, folder: str | Path, state: Any, model: Any) -> None:
            if not state.is_world_process_zero:
                return
            if not self.looked:  # at once: retention may have removed that version by the end
                self.trained_from, self.looked = _version_of_loaded(model), True
            _write(Path(folder), _said(self.trained_from, about))

    return MainstemCallback()


def _version_of_loaded(model: Any) -> str | None:
    loaded = getattr(getattr(model, "config", None), "_name_or_path", None)  # of an adapter's model: the base's
    try:
        if not loaded:
            raise NotTold(f"the model was not loaded from a folder: {SAY_SO}")
        return version_of(loaded)
    except NotTold as error:
        log.warning("%s will not say what it was trained from: %s", EXPERT_JSON, error)
        return None


def _said(trained_from: str | None, about: dict[str, Any]) -> dict[str, Any]:
    """What expert.json is to say. Raises ValueError where it would be refused, as far as that is known here."""
    said = {key: value for key, value in {**about, "trained_from": trained_from}.items() if value is not None}
    try:
        from daemon.checkpoints.expert_json import About
    except ImportError:  # this file alone is here: the daemon will say it
        return said
    About.model_validate(said)
    return said


def _write(folder: Path, said: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / EXPERT_JSON
    path.write_text(json.dumps(said, indent=2, allow_nan=False) + "\n")
    return path


def _field(path: Path, name: str) -> Any:
    """A field of an object in a file; None where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content.get(name) if isinstance(content, dict) else None


def _asked(repo: str, commit: str) -> str:
    """The version that a commit is, by the daemon at HF_ENDPOINT."""
    api = HfApi()
    try:
        tags = api.list_repo_refs(f"{NAMESPACE}/{repo}").tags
    except Exception as error:  # of the network, of the Hub, of the client: each has its own
        what = f"{api.endpoint} does not say which version {NAMESPACE}/{repo} is ({error})"
        raise NotTold(f"{what}: let HF_ENDPOINT be the daemon, or {SAY_SO}") from error
    numbers = [tag.name.removeprefix("v") for tag in tags if tag.target_commit == commit]
    if not numbers:
        raise NotTold(f"{api.endpoint} no longer has {NAMESPACE}/{repo} at {commit}: {SAY_SO}")
    return f"{repo.removesuffix('-adapter')}/{numbers[0]}"
