"""What is measured and told.

    compare.py  two versions, and what each keeps of the experts
    inspect.py  everything that merging would check
    report/     a home as one page

Changes nothing.
"""
