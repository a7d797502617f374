"""What an expert does to the base, by which it is known again in other files."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Adds experts.content_sha256, one row of each among the merged. Those that arrived before keep NULL: it is worked
    out from the archive once an expert of the same norm comes."""
    op.add_column("experts", sa.Column("content_sha256", sa.Text))
    merged = sa.text("status = 'merged'")
    op.create_index("experts_content_once", "experts", ["content_sha256"], unique=True, sqlite_where=merged)
    unknown = sa.text("status = 'merged' AND content_sha256 IS NULL")
    op.create_index("experts_without_content", "experts", ["content_sha256", "norm"], sqlite_where=unknown)
