"""A home as a whole.

    founding.py      makes one
    presets.py       sets of heads that have a name
    named_heads.py   those that the settings name, held against those that it has
    ground.py        what every merge stands on, the base and the states, looked at each time
    recovery.py      brings it back to where its registry says it is
    uncommitted.py   what lies in it beyond its registry
    presence.py      what a running daemon says of itself
    supervision.py   that the loop goes on, and who is told: systemd and /livez
    orders.py        what a person told it: to pause, or to finish the queue and stop
    health.py        what is wrong, as far as can be seen at once
    condition.py     what is going on in it right now, in words
    attention.py     what needs a person, and the command that ends it
    standing.py      which of its versions are held, and what ends that
    verification.py  everything hashed again
    restoring.py     how a person puts back what was edited or lost

The registry says what is true; everything else here is brought to it or checked against it.
"""
