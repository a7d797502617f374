"""What is published, as an OCI registry that can only be read: each version is a ModelPack artifact, whose layers are
the files as they lie on the disk.

    artifacts.py  the manifest and the config of a version, derived from its manifest.json
    finding.py    which version a tag or a digest means
    reading.py    the addresses
"""

from daemon.http.oci.reading import oci_routes

__all__ = ["oci_routes"]
