"""How an expert's tensor names became the base's when it was merged, by which a rebuild reads it again."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Adds experts.naming. Those that arrived before keep NULL: nobody wrote it down."""
    op.add_column("experts", sa.Column("naming", sa.Text))
