"""What `mainstem study` does: methods and their parameters tried on the same experts, in several orders of arrival.

    planning.py   what is tried on what, in which orders, and what that takes
    course.py     one order of arrival, through a home of its own
    costing.py    the seconds and the memory of one method by itself
    studying.py   all of it, one after the other; goes on where it was
    results.py    what came of it, and which method is recommended
    telling.py    that, as a table and as a section of the report

Nothing is folded here: every version is made as the daemon makes it, by the Merger over a home.
"""
