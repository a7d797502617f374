"""safetensors on descriptors, and the task vectors in them.

    header.py      the strict header
    slabs.py       page-locked host memory
    tensorfile.py  one file, read and written piece by piece
    source.py      task vectors, one tensor at a time

Read by pread, never mapped; bounded memory whatever a file says.
"""
