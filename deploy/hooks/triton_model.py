#!/usr/bin/env python3
"""A Triton server with the vLLM backend loads the new version.

    [hooks]
    published = [["/path/to/triton_model.py", "http://127.0.0.1:8000", "/srv/triton/models", "chat", "{folder}"]]

Written for Triton 25.02 and later, started with `--model-control-mode=explicit`: the model repository extension's `POST
/v2/repository/models/NAME/load`. Tested against a receiver that answers as it does; never run against Triton itself.
REPOSITORY/NAME has a config.pbtxt with `backend: "vllm"`; what 1/model.json says beside "model" stays.
"""

import json
import sys
from pathlib import Path

from asking import ask

url, repository, name, folder = sys.argv[1:]
path = Path(repository) / name / "1" / "model.json"
path.parent.mkdir(parents=True, exist_ok=True)
engine = json.loads(path.read_text()) if path.exists() else {}
new = path.with_name(".model.json.new")
new.write_text(json.dumps({**engine, "model": folder}, indent=2) + "\n")
new.replace(path)
ask(f"{url}/v2/repository/models/{name}/load")
print(f"{url} serves {folder} as {name}")
