"""A checkpoint as somebody else left it.

    opening.py          opens what lies in a folder that others write to
    unfinished.py       names under which other programs write what is not finished
    weight_names.py     what the files that hold weights are called, in this format and in others
    nesting.py          where in a dropped folder the checkpoint is
    shard_index.py      which file holds which tensor
    expert_json.py      what an expert says about itself
    adapter_config.py   what a PEFT adapter says about itself
    adapter_modules.py  which tensors a LoRA adapter can move
    checkpoint.py       any of them, opened: tensors and their identity
    hints.py            the paths in hints

Opened by descriptor, one path component at a time; read, never written; refused rather than guessed.
"""
