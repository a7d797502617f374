"""What there is to compute with, and how far it is.

    resources.py  what the settings of [compute] mean on this machine, and how it keeps freed memory
    progress.py   watches the driver: how far, how long, and whether to stop

Decides where and how wide; never what is computed.
"""
