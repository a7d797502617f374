"""What the names of tensors say.

    naming.py     how an expert's names become the base's
    buffers.py    derived buffers and running statistics
    quantised.py  quantised weights

Nothing here reads a value.
"""
