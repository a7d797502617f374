"""What could keep a home from working on this machine: looked for, and each thing with what to do about it.

    examining.py   all of it, in order
    finding.py     one thing that was looked at
    limits.py      what the system lets a process have: file system events, open files, threads
    disks.py       what the home lies on: kind, free space, how long a sync takes
    owners.py      who may read and write it
    clocks.py      what time it is
    computing.py   torch, its device and the memory
    lineage.py     the registry, and the settings

Changes nothing, but for a small file that is written, synced and removed again.
"""
