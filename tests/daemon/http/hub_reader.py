"""What test_hub_clients.py runs in a process of its own, with HF_ENDPOINT set: the real clients, read.

Each line on its standard output is one thing that came, as JSON; it waits for a line on its standard input in between.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


def told(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def digests(folder: str) -> dict[str, str]:
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> None:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

    AutoModel.from_pretrained("mainstem/main")
    told(first=digests(snapshot_download("mainstem/main")))
    told(tokens=AutoTokenizer.from_pretrained("mainstem/main")("w1 w2")["input_ids"])
    generated = pipeline("text-generation", "mainstem/main", revision="v1")("w1 w2", max_new_tokens=2)
    told(generated=generated[0]["generated_text"])
    base = AutoModelForCausalLM.from_pretrained("mainstem/main", revision="v0")
    tuned = PeftModel.from_pretrained(base, "mainstem/main-adapter", revision="v1")
    told(adapter=type(tuned).__name__, rank=tuned.peft_config["default"].r)
    told(old=digests(snapshot_download("mainstem/main", revision="v0")))
    told(commit=HfApi().model_info("mainstem/main").sha)
    errors = []
    for repo, name, revision in (
        ("mainstem/main", "none", "main"),
        ("mainstem/main", "config.json", "v99"),
        ("mainstem/none", "config.json", "main"),
        ("google-bert/bert", "config.json", "main"),
    ):
        try:
            hf_hub_download(repo, name, revision=revision)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
            errors.append(type(error).__name__)
    told(errors=errors)
    sys.stdin.readline()  # another version is live from here on
    AutoModel.from_pretrained("mainstem/main")
    told(second=digests(snapshot_download("mainstem/main")))
    told(pinned=digests(snapshot_download("mainstem/main", revision="v1")))


if __name__ == "__main__":
    main()
