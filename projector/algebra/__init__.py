"""Linear algebra in blocks.

    linalg.py     blocks of rows, norms, Gram matrices
    matrices.py   which tensors are matrices
    svd.py        decompositions from the smaller Gram matrix, or a sketch
    low_rank.py   the best approximation of a rank
    selection.py  the k-th largest magnitude, exact

Norms and Gram matrices are float64; the same bits on the same machine.
"""
