"""What alembic runs for an upgrade: on the connection and inside the transaction that `upgrade` has begun."""

from alembic import context

from registry.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,  # alembic assumes that SQLite cannot; it can, once sqlite3 leaves transactions to us
)
with context.begin_transaction():
    context.run_migrations()
