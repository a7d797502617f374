"""What there is to compute with, how far it is, and other programs that compute.

    resources.py  what the settings of [compute] mean on this machine, and how it keeps freed memory
    progress.py   watches the driver: how far, how long, and whether to stop
    open_files.py  how many there may be
    processes.py  other programs, started and ended
    commands.py   an operator's command, run to its end
    conversing.py  one that stays, and is asked again and again
    leash.py      the process that ends them when ours has ended

Decides where and how wide; never what is computed.
"""
