"""What is asked at every poll, arrival and request is found by an index, and experts are counted as they come."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

ONE_MORE = (
    "INSERT INTO tallies (status, experts) VALUES (NEW.status, 1)"
    " ON CONFLICT (status) DO UPDATE SET experts = experts + 1;"
)
ONE_LESS = "UPDATE tallies SET experts = experts - 1 WHERE status = OLD.status;"


def upgrade() -> None:
    """Adds indexes to experts and versions, and the table tallies with the triggers that keep it."""
    op.create_index("experts_by_sha256", "experts", ["sha256"])
    op.create_index("experts_by_name", "experts", ["name"])
    op.create_index("experts_by_given_name", "experts", [sa.text("json_extract(about, '$.name')")])
    op.create_index("experts_unplaced", "experts", ["id"], sqlite_where=sa.text("place IS NULL"))
    op.create_index(
        "experts_lineage", "experts", ["status", "version", "norm"], sqlite_where=sa.text("status = 'merged'")
    )
    op.create_index("versions_kept", "versions", ["head", "number"], sqlite_where=sa.text("collected = 0"))
    op.create_index("versions_branched", "versions", ["head", "number"], sqlite_where=sa.text("parent <> number - 1"))
    op.create_table(
        "tallies",
        sa.Column("status", sa.Text, primary_key=True),
        sa.Column("experts", sa.Integer, nullable=False),
    )
    op.execute("INSERT INTO tallies SELECT status, count(*) FROM experts GROUP BY status")
    op.execute(f"CREATE TRIGGER tally_insert AFTER INSERT ON experts BEGIN {ONE_MORE} END")
    op.execute(f"CREATE TRIGGER tally_update AFTER UPDATE OF status ON experts BEGIN {ONE_LESS} {ONE_MORE} END")
    op.execute(f"CREATE TRIGGER tally_delete AFTER DELETE ON experts BEGIN {ONE_LESS} END")
