"""Versions that are held, evaluations and the gate's verdicts; blocked experts, pins, and what people did."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Adds columns that say nothing of what is there already, and the tables evaluations and interventions."""
    op.add_column("heads", sa.Column("frozen", sa.Text))
    op.add_column("heads", sa.Column("relative_to", sa.Text, server_default="base", nullable=False))
    op.add_column("heads", sa.Column("previous", sa.Integer))
    for name, kind in (("trained_head", sa.Text), ("trained_version", sa.Integer), ("verdict", sa.Text)):
        op.add_column("experts", sa.Column(name, kind))
    op.add_column("experts", sa.Column("blocked", sa.Boolean, server_default=sa.text("0"), nullable=False))
    op.add_column("experts", sa.Column("closed_at", sa.DateTime))
    op.add_column("experts", sa.Column("evaluation", sa.Integer))
    for name, kind in (("held", sa.Text), ("verdict", sa.Text), ("evaluation", sa.Integer)):
        op.add_column("versions", sa.Column(name, kind))
    op.add_column("versions", sa.Column("pinned", sa.Boolean, server_default=sa.text("0"), nullable=False))
    op.add_column("versions", sa.Column("trained", sa.Integer, server_default=sa.text("0"), nullable=False))
    blocked = sa.text("blocked = 1")
    unsettled = sa.text("status = 'quarantined' AND closed_at IS NULL")
    op.create_index("experts_blocked", "experts", ["sha256"], sqlite_where=blocked)
    op.create_index("experts_blocked_content", "experts", ["content_sha256"], sqlite_where=blocked)
    op.create_index("experts_open", "experts", ["id"], sqlite_where=unsettled)
    unneeded = sa.text("collected = 0 AND pinned = 0 AND trained = 0")
    op.create_index("versions_unneeded", "versions", ["head", "number"], sqlite_where=unneeded)
    op.create_index("versions_held", "versions", ["head", "number"], sqlite_where=sa.text("held IS NOT NULL"))
    op.drop_index("versions_branched", "versions")  # versions form a line: each follows the newest, whichever is live
    op.create_table(
        "evaluations",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("weights_sha256", sa.Text, nullable=False),
        sa.Column("command_sha256", sa.Text, nullable=False),
        sa.Column("scores", sa.Text, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
    )
    op.create_index("evaluations_of_weights", "evaluations", ["weights_sha256", "command_sha256"])
    op.create_table(
        "interventions",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("deed", sa.Text, nullable=False),
        sa.Column("who", sa.Text, nullable=False),
        sa.Column("why", sa.Text),
        sa.Column("head", sa.Text),
        sa.Column("version", sa.Integer),
        sa.Column("previous", sa.Integer),
        sa.Column("experts", sa.Text),
        sa.Column("at", sa.DateTime, nullable=False),
    )
