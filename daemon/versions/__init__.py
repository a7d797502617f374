"""A version: what it is on the disk, and how long it stays.

    heads.py         a head as it stands: what its next version continues from
    writing.py       the next version of a head while it is written
    companions.py    what goes with the weights
    modules.py       modules in folders of their own, which every version has from the base
    adapter.py       the merged task vector as a LoRA adapter
    card.py          the model card
    weight_files.py  which weights files it is written in
    checking.py      which files it has, and whether its manifest says so too
    sealing.py       companions, card and manifest, all durable; and everything renamed into place
    latest.py        the names by which readers find the live one
    routed.py        one of a smile head as a model whose layers choose among its experts
    modeling_smile.py  the code beside that, for whoever loads it; nothing here imports it
    view_file.py     an expert's own model out of it
    retention.py     which versions' files go

Written beside what is live, sealed by its manifest, and never changed afterwards.
"""
