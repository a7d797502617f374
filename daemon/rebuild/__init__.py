"""Merging the archive again: into a new home, a new head, or without some of its experts."""
