"""Fetching a version from a running mainstem."""
