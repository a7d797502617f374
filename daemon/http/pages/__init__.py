"""The pages: HTML made here, readable without script; a small one keeps them up to date.

    routes.py     their endpoints
    document.py   a page as an answer: its policy, where its links lead from
    now.py        what is said of the present, in a page and in the events
    front.py      the first page
    arrived.py    experts: the list, and one of them
    versions.py   the lineage, and one version
    commands.py   what can be copied to get a version
    lineage.py    the rows of a lineage
    graph.py      and how they are drawn
    measured.py   what is charted of the versions
    charts.py     and how
    ground.py     disk, memory, retention against their limits
    words.py      what is said instead of bare figures

None of them grows with the number of experts.
"""
