"""The disk, under everything.

    durable.py     how bytes become durable, and names change
    out.py         what a command makes for a person, and where
    failpoints.py  where a test makes the daemon die or the disk fail

Nothing else syncs, renames, links, locks or removes a file.
"""
