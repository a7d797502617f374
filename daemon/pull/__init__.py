"""Fetching a version from a running mainstem, and sending it an expert.

    client.py            one origin, and which faults may pass
    foreign_manifest.py  a manifest as somebody else's words
    fetching.py          files by parts, several at once
    target.py            the folder that is brought to a version
    pulling.py           the whole of it
    pushing.py           an expert sent, and what becomes of it

Nothing that comes over the network is believed before it is checked.
"""
