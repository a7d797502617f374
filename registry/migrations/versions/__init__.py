"""The migrations, one file each, named after their revision."""
