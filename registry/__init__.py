"""The lineage database. Internal to mainstem, whatever its name says."""
