"""The laws that every merging method obeys.

    checks.py   the laws
    trial.py    the stream that they run a method on
    listing.py  what can be said of a method from its code

Public: `LAWS`, which packages hold methods of their own to, and the type `Law`.
"""

from projector.laws.checks import LAWS, Law

__all__ = ["LAWS", "Law"]
