"""An expert through every head, in one pass.

    fold.py      the driver
    head.py      what goes into a fold for each head, and comes out
    steps.py     a tensor or a block of its rows, and its memory
    pipeline.py  reads ahead, hands over in order
    device.py    CPU or CUDA, which may fail
    measure.py   measures checkpoints without folding
    averages.py  running statistics
    adamerging.py  coefficients that are learned
    view.py      an expert's own model out of a merged one
    routed.py    a model whose layers choose among experts, out of a smile head

One thread reads, workers compute, one writes in order: no bit depends on threads.
"""
