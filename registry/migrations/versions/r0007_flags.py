"""What was odd about an expert that was merged all the same, and an index of those of which something was."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Adds experts.flags. Those that arrived before keep NULL: nobody held them against what was usual then."""
    op.add_column("experts", sa.Column("flags", sa.Text))
    op.create_index("experts_flagged", "experts", ["id"], sqlite_where=sa.text("flags IS NOT NULL"))
