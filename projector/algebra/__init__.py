"""Linear algebra in blocks.

    linalg.py     which tensors are matrices, blocks of rows, norms, Gram matrices
    svd.py        decompositions from the smaller Gram matrix, or a sketch
    low_rank.py   the best approximation of a rank
    selection.py  the k-th largest magnitude, exact

Norms and Gram matrices are float64; the same bits on the same machine.
"""
