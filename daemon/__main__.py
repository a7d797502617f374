"""`python -m daemon` is `mainstem`."""

from daemon.cli import main

main()
