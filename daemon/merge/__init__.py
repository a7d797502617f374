"""From a settled drop to a version that everyone sees.

    merger.py     the publish protocol, top to bottom
    folding.py    how experts become states and weights, here and where the archive is merged again
    gate.py       whether a version may go live
    preparing.py  what a head prepares while nothing arrives
    lingering.py  what stays in the inbox for a while, and why
    outcome.py    what became of an expert, for the log and the metrics

Files first, all durable; then one transaction; then what is derived of it.
"""
