"""A version as a ModelPack artifact: an OCI image manifest whose layers are the version's files, each raw.

All is derived from the version's manifest.json and from nothing else, so the bytes, and with them the digests that
others pin, are the same for ever. **What is written here must not change**: a new form is a new artifact beside it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from daemon.manifest import FileEntry, Manifest

MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
LAYER_TYPE = "application/vnd.cncf.model.{kind}.v1.raw"
KINDS = {".safetensors": "weight", ".md": "doc", "LICENSE": "doc", ".py": "code"}  # by how a name ends
OTHER_KIND = "weight.config"
FILE_PATH = "org.cncf.model.filepath"
TITLE = "org.opencontainers.image.title"  # by which oras names the file

_Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Artifact:
    """`manifest` and `config` as bytes, and their sha256 and those of the files, in hex. files: by the sha256."""

    manifest: bytes
    sha256: str
    config: bytes
    config_sha256: str
    files: Mapping[str, FileEntry]

    @classmethod
    def of(cls, name: str, version: Manifest, files: Mapping[str, FileEntry]) -> Self:
        """The one called `name` (as `mainstem/main`) of these files of a version, by their names in it."""
        tag, revision = f"v{version.content['version']}", _sha256(version.raw)
        created = version.content.get("created_at")
        config = _bytes(
            {
                "descriptor": {
                    **({"createdAt": created} if created else {}),
                    "name": name,
                    "version": tag,
                    "revision": revision,
                },
                "config": {"format": "safetensors"},
                "modelfs": {"type": "layers", "diffIds": [f"sha256:{entry.sha256}" for entry in files.values()]},
            }
        )
        manifest = _bytes(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "config": _descriptor(CONFIG_TYPE, _sha256(config), len(config)),
                "layers": [
                    {
                        **_descriptor(_layer_type(path), entry.sha256, entry.size),
                        "annotations": {FILE_PATH: path, TITLE: path},
                    }
                    for path, entry in files.items()
                ],
                "annotations": {
                    **({"org.opencontainers.image.created": created} if created else {}),
                    TITLE: name,
                    "org.opencontainers.image.version": tag,
                    "org.opencontainers.image.revision": revision,
                },
            }
        )
        found = {entry.sha256: entry for entry in files.values()}
        return cls(manifest, _sha256(manifest), config, _sha256(config), found)

    def has(self, sha256: str) -> bool:
        """Whether one of its blobs has that sha256."""
        return sha256 == self.config_sha256 or sha256 in self.files


def _descriptor(kind: str, sha256: str, size: int) -> _Json:
    return {"mediaType": kind, "digest": f"sha256:{sha256}", "size": size}


def _layer_type(path: str) -> str:
    return LAYER_TYPE.format(kind=next((kind for end, kind in KINDS.items() if path.endswith(end)), OTHER_KIND))


def _bytes(content: _Json) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
