"""The archive merged again.

    commands.py    what `mainstem rebuild` does
    plan.py        what it would do, and how much of it there is
    replay.py      archived experts merged into another home, in their order
    restating.py   a next version that folds no new expert
    candidates.py  experts told apart where one word names several

By the ordinary publish protocol, beside what is live, and resumable at any point.
"""
