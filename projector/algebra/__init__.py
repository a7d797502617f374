"""Linear algebra in blocks: norms, Gram matrices, decompositions, exact order statistics."""
