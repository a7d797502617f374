"""What the names of tensors say.

    naming.py     how an expert's names become the base's
    buffers.py    derived buffers and running statistics
    quantised.py  quantised weights
    depth.py      lists of layers, and how far down one a tensor lies

Nothing here reads a value.
"""
