"""Which tensor of an expert stands for which of the base.

    matching.py    names, tied weights, what is left out
    fitting.py     prefixes, wrappers and heads that come off by themselves
    task_heads.py  whose a head of a model is
    resized.py     a vocabulary of another size

One way or none: what could be two is refused.
"""
