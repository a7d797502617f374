"""The first layout."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Builds all tables. Kept as it is for ever: databases of that time must get the tables of that time."""
    op.create_table(
        "home",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text, nullable=False),
        sa.Column("parameters", sa.Integer, nullable=False),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.CheckConstraint("id = 1", name="home_is_one_row"),
    )
    op.create_table(
        "heads",
        sa.Column("name", sa.Text, primary_key=True),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("method", sa.Text, nullable=False),
        sa.Column("params", sa.Text, nullable=False),
        sa.Column("live", sa.Integer, nullable=False),
        sa.Column("newest", sa.Integer, nullable=False),
        sa.CheckConstraint("live >= 0 AND live <= newest", name="head_live_exists"),
        sa.UniqueConstraint("position"),
    )
    op.create_table(
        "experts",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("sha256", sa.Text),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("status", sa.Text, nullable=False),
        sa.Column("received_at", sa.DateTime, nullable=False),
        sa.Column("entry", sa.Text, nullable=False),
        sa.Column("norm", sa.Double),
        sa.Column("duplicate_of", sa.Integer),
        sa.Column("reason", sa.Text),
        sa.Column("detail", sa.Text),
        sa.Column("hint", sa.Text),
        sa.Column("version", sa.Integer),
        sa.Column("finished_at", sa.DateTime, nullable=False),
        sa.Column("place", sa.Text),
        sa.CheckConstraint("status IN ('merged', 'duplicate', 'quarantined')", name="expert_status_known"),
        sa.CheckConstraint("(status = 'merged') = (version IS NOT NULL)", name="expert_merged_has_version"),
        sa.CheckConstraint("status != 'merged' OR sha256 IS NOT NULL", name="expert_merged_has_sha256"),
        sa.ForeignKeyConstraint(["duplicate_of"], ["experts.id"]),
        sqlite_autoincrement=True,
    )
    merged = sa.text("status = 'merged'")
    op.create_index("experts_merged_once", "experts", ["sha256"], unique=True, sqlite_where=merged)
    op.create_index("experts_one_a_version", "experts", ["version"], unique=True)
    op.create_index("experts_by_status", "experts", ["status", "id"])
    op.create_table(
        "versions",
        sa.Column("head", sa.Text, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("parent", sa.Integer),
        sa.Column("manifest_sha256", sa.Text, nullable=False),
        sa.Column("size_bytes", sa.Integer, nullable=False),
        sa.Column("totals", sa.Text, nullable=False),
        sa.Column("figures", sa.Text, nullable=False),
        sa.Column("expert_id", sa.Integer),
        sa.Column("seconds", sa.Double),
        sa.Column("created_at", sa.DateTime, nullable=False),
        sa.Column("collected", sa.Boolean, nullable=False),
        sa.ForeignKeyConstraint(["head", "parent"], ["versions.head", "versions.number"]),
        sa.CheckConstraint(
            "(number = 0 AND parent IS NULL AND expert_id IS NULL)"
            " OR (number > parent AND parent >= 0 AND expert_id IS NOT NULL)",
            name="version_has_parent_and_expert",
        ),
        sa.ForeignKeyConstraint(["head"], ["heads.name"]),
        sa.ForeignKeyConstraint(["expert_id"], ["experts.id"]),
    )
