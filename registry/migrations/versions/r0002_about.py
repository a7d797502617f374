"""What an expert brings beside its weights: the content of its expert.json, and the digests of its sidecars."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds experts.about and experts.sidecars. Those that arrived before keep NULL: they were not asked."""
    op.add_column("experts", sa.Column("about", sa.Text))
    op.add_column("experts", sa.Column("sidecars", sa.Text))
