"""Is a version any good?

    figures.py  the field's figures, from scores alone

Nothing here knows what a score measures.
"""
