"""The disk, under everything.

    durable.py     how bytes become durable, and names change
    failpoints.py  where a test makes the daemon die or the disk fail

Nothing else syncs, renames, links, locks or removes a file.
"""
