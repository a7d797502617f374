"""What is not safetensors or not PEFT's made so.

    converting.py   one command over files and folders
    confining.py    the process that reads a pickle, and what it may do
    unpickling.py   the reader that runs there
    state_dicts.py  which tensors a pickle's objects are
    adapters.py     adapters of other tools

A pickle is read in a confined process, and nothing in it is run.
"""
