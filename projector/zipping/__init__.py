"""Two models zipped by their features: ZipIt! (Stoica et al., arXiv 2305.03053).

    moments.py   the correlations of two models' features, from batches
    pairing.py   which features become one
    graph.py     which axes of which tensors a model's features lie along
    applying.py  weights zipped by that

Features come in as rows of numbers, and weights as tensors: nothing here runs a model. It is no method of a head, for
it needs data and the model's graph.
"""
