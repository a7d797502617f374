"""What a person does to a home, beside dropping experts: each is a row of the registry that says who, when and why.

    deeds.py        what each does, to a home that nobody else writes
    cases.py        refused experts: back into the inbox, or out of the home
    requests.py     how a command reaches the daemon that holds the home, and how it answers
    collecting.py   what retention no longer keeps, removed at once
    pruning.py      archive and quarantine, thinned out
    waiting.py      what that daemon does between two arrivals: experts taken out, and what retention no longer keeps

A home has one writer: where a daemon runs, it does what is asked, also in the middle of a merge.
"""
