"""What a trainer's expert.json says; tests/daemon/http/test_hub_clients.py has the callback in a real Trainer."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from daemon import trainers
from daemon.checkpoints.expert_json import ABOUT, read_about
from daemon.trainers import NotTold, version_of, write_expert_json
from tests.daemon.homes import make_home

COMMIT = "0123456789" * 4


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    about = {"name": "german", "task": "Verträge", "weight": 0.5, "data": ["urn:a", {"sha256": 64 * "a"}]}
    path = write_expert_json(tmp_path / "german", trained_from="init/3", **about)
    assert path.name == ABOUT
    fd = os.open(path, os.O_RDONLY)
    try:
        assert read_about(fd).given() == {**about, "trained_from": "init/3"}
    finally:
        os.close(fd)


def test_a_version_is_known_by_its_manifest_and_a_checkpoint_by_what_it_says(tmp_path: Path) -> None:
    save_file({"w": torch.eye(4)}, tmp_path / "base.safetensors")
    home = make_home(tmp_path / "home", tmp_path / "base.safetensors", [("main", "mean", {}), ("init", "ema", {})])
    pulled = shutil.copytree(home.version("init", 0), tmp_path / "pulled")
    assert version_of(pulled) == version_of(home.latest("init")) == "init/0"
    write_expert_json(tmp_path / "checkpoint-1", start=pulled)
    assert version_of(tmp_path / "checkpoint-1") == "init/0"


def test_what_says_nothing_is_an_error_that_has_the_way_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / f"models--mainstem--init/snapshots/{COMMIT}"
    cached.mkdir(parents=True)
    monkeypatch.setattr(trainers, "HfApi", partial(HfApi, "http://127.0.0.1:9"))  # where nobody listens
    for start, words in ((tmp_path, "nothing in"), ("mainstem/init", "no folder"), (cached, "HF_ENDPOINT")):
        with pytest.raises(NotTold, match=words) as caught:
            write_expert_json(tmp_path / "german", start=start)
        assert 'trained_from="init/3"' in str(caught.value)
    for other in ("[]", '{"head": "init"}', "no JSON"):  # a manifest.json of somebody else's
        (tmp_path / "manifest.json").write_text(other)
        with pytest.raises(NotTold, match="nothing in"):
            version_of(tmp_path)
    assert not (tmp_path / "german").exists()


@pytest.mark.parametrize("about", [{"weight": 0}, {"tusk": "german"}, {"task": "a\nb"}, {"trained_from": "init"}])
def test_what_would_be_refused_is_not_written(about: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(about))):
        write_expert_json(tmp_path, **about)
    assert not list(tmp_path.iterdir())


def test_the_file_alone_is_enough(tmp_path: Path) -> None:
    """Copied to where there is no mainstem, and nothing is imported that takes long."""
    shutil.copy(trainers.__file__, tmp_path / "saying.py")
    program = (
        "import sys; sys.modules.update({'daemon': None})\n"
        "import saying; saying.write_expert_json('german', trained_from='init/3', task='german')\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    assert json.loads((tmp_path / "german" / ABOUT).read_text()) == {"task": "german", "trained_from": "init/3"}
