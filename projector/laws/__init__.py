"""The laws that every merging method obeys.

    checks.py   the laws
    trial.py    the stream that they run a method on
    listing.py  what can be said of a method from its code

Public: a method of another package is held to them by `from projector.laws.checks import LAWS`.
"""
