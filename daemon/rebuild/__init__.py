"""The archive merged again.

    commands.py   what `mainstem rebuild` does or would do
    learning.py   coefficients of the archived experts, learned by what the operator's command says
    refining.py   what is made of a head beyond one pass over the archive
    replay.py     archived experts merged into another home, in their order
    restating.py  a next version that folds no new expert

By the ordinary publish protocol, beside what is live, and resumable at any point.
"""
