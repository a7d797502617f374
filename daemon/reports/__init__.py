"""What is measured and told.

    compare.py   two versions, and what each keeps of the experts
    evaluate.py  the scores of what is there already
    inspect.py   everything that merging would check
    sizing.py    what an arrival and a home take of disk, memory and time
    report/      a home as one page

Changes nothing of a home but what is known of it.
"""
