"""`mainstem demo`."""


def command() -> None:
    """Not yet."""
