"""Tells others what happened: webhooks, and hooks that reload servers.

    told.py       an event as it is told
    posting.py    one attempt to tell a URL
    hooking.py    one attempt to run a command
    couriers.py   one endpoint's deliveries, in their order, until each was made or is given up
    sending.py    all endpoints of the settings
    stalling.py   whether anything goes on

What is to be told lies in the registry, written by whoever committed it: nothing here can hold that up, and nothing is
lost with this process. Everything may be told twice, by the same name.
"""
