"""Who is told of events, and what each was told."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Adds the tables endpoints and deliveries."""
    op.create_table(
        "endpoints",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("events", sa.Text),
        sa.Column("since", sa.DateTime, nullable=False),
        sa.Column("dropped", sa.Integer, nullable=False),
        sa.UniqueConstraint("kind", "target"),
    )
    op.create_table(
        "deliveries",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("endpoint", sa.Integer, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("event", sa.Text, nullable=False),
        sa.Column("data", sa.Text, nullable=False),
        sa.Column("at", sa.DateTime, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("next_at", sa.DateTime),
        sa.Column("tried_at", sa.DateTime),
        sa.Column("answer", sa.Text),
        sa.ForeignKeyConstraint(["endpoint"], ["endpoints.id"]),
        sqlite_autoincrement=True,
    )
    op.create_index("deliveries_of", "deliveries", ["endpoint", "id"])
    pending, dead = sa.text("outcome = 'pending'"), sa.text("outcome = 'dead'")
    op.create_index("deliveries_pending", "deliveries", ["endpoint", "id"], sqlite_where=pending)
    op.create_index("deliveries_dead", "deliveries", ["id"], sqlite_where=dead)
