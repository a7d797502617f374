"""Experts that were taken out again, and versions that fold no new expert.

SQLite cannot change a CHECK: both tables are made anew and take over the rows. References are not checked meanwhile
(see `registry.migrations.upgrade`).
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Adds the status "withdrawn" and experts.withdrawn_in; a version above 0 may be without an expert."""
    op.create_table(
        "experts_0003",
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
        sa.Column("about", sa.Text),
        sa.Column("sidecars", sa.Text),
        sa.Column("withdrawn_in", sa.Integer),
        sa.CheckConstraint("status IN ('merged', 'duplicate', 'quarantined', 'withdrawn')", name="expert_status_known"),
        sa.CheckConstraint(
            "(status IN ('merged', 'withdrawn')) = (version IS NOT NULL)", name="expert_merged_has_version"
        ),
        sa.CheckConstraint("(status = 'withdrawn') = (withdrawn_in IS NOT NULL)", name="expert_withdrawn_has_version"),
        sa.CheckConstraint("version IS NULL OR sha256 IS NOT NULL", name="expert_merged_has_sha256"),
        sa.ForeignKeyConstraint(["duplicate_of"], ["experts.id"]),
        sqlite_autoincrement=True,
    )
    op.execute("INSERT INTO experts_0003 SELECT *, NULL FROM experts")
    op.drop_table("experts")
    op.rename_table("experts_0003", "experts")
    merged = sa.text("status = 'merged'")
    op.create_index("experts_merged_once", "experts", ["sha256"], unique=True, sqlite_where=merged)
    op.create_index("experts_one_a_version", "experts", ["version"], unique=True)
    op.create_index("experts_by_status", "experts", ["status", "id"])
    op.create_table(
        "versions_0003",
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
            "(number = 0 AND parent IS NULL AND expert_id IS NULL) OR (number > parent AND parent >= 0)",
            name="version_has_parent",
        ),
        sa.ForeignKeyConstraint(["head"], ["heads.name"]),
        sa.ForeignKeyConstraint(["expert_id"], ["experts.id"]),
    )
    op.execute("INSERT INTO versions_0003 SELECT * FROM versions")
    op.drop_table("versions")
    op.rename_table("versions_0003", "versions")
