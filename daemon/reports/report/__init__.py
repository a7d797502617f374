"""What `mainstem report` makes: a home as one page.

    gathering.py  what it is made of, read from the registry
    overlaps.py   the cosines between experts, read from the archive
    parts.py      sections, charts and tables
    charts.py     drawings
    scored.py     the sections about scores
    merged.py     those about merging
    document.py   the page

Only charts.py knows the library that draws.
"""
