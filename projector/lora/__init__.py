"""A PEFT LoRA adapter as a source of task vectors.

    config.py           ranks, scalings, and how its factors lie
    keys.py             the names of its tensors
    patterns.py         patterns for modules' names, in bounded time
    targets.py          which modules PEFT puts it into
    families.py         what modules are called in the files of known models
    adapter_fitting.py  its names made the base's
    plan.py             which factors make which tensor
    delta.py            the product
    expert.py           the source
    absent.py           what to say of a tensor that the base has not
    tied.py             tensors that are there a second time
    other_tools.py      adapters of other tools, told by their names

Its product with the base's shape, whatever wrote it; what cannot be merged is refused by name.
"""
