"""A version: its files and manifest, what is sealed into it, its names for readers, how long it stays."""
