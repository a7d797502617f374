"""A version is found by the beginning of its manifest's sha256."""

from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Adds an index to versions."""
    op.create_index("versions_by_manifest", "versions", ["head", "manifest_sha256"])
