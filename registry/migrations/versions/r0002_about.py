"""What an expert says about itself: the content of its expert.json."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Adds experts.about. Those that arrived before keep NULL: they were not asked."""
    op.add_column("experts", sa.Column("about", sa.Text))
