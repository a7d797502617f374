#!/usr/bin/env python3
"""MLflow's model registry gets each version that becomes live, and its alias `live` names that one.

    [hooks]
    published = [["/path/to/mlflow_model.py", "http://127.0.0.1:5000", "mainstem-{head}", "{folder}", "hf://mainstem/{head}@v{version}"]]

Written for MLflow 3.17, of which the hook's python3 needs `mlflow-skinny`. Tested with it against an SQLite store
(`sqlite:////srv/mlflow.db` in the place of the address, with sqlalchemy and alembic); run by hand against `mlflow
server`. MLflow counts its versions by itself: `head`, `version` and `sha256` (of manifest.json) are tags of them. The
last word is the source. A server refuses folders and http addresses as such, so it is the name that docs/hub.md reads,
which MLflow does not download. With a database leave it out: the source is the folder then, and
`models:/mainstem-main@live` is downloaded from there.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # the hook itself is tried again; seven take minutes

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

url, name, folder, *source = sys.argv[1:]
raw = (Path(folder) / "manifest.json").read_bytes()
manifest = json.loads(raw)
sha256 = hashlib.sha256(raw).hexdigest()
client = MlflowClient(url, url)
try:
    client.create_registered_model(name)
except MlflowException as error:
    if error.error_code != "RESOURCE_ALREADY_EXISTS":
        raise
found = client.search_model_versions(f"name = '{name}' and tags.sha256 = '{sha256}'", max_results=1)
if found:  # live again, or told twice
    (version,) = found
else:
    tags = {"head": manifest["head"], "version": str(manifest["version"]), "sha256": sha256}
    version = client.create_model_version(name, source[0] if source else folder, tags=tags)
client.set_registered_model_alias(name, "live", version.version)
print(f"{url} has {manifest['head']}/{manifest['version']} as {name} {version.version}, live")
