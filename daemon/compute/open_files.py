"""How many files this process may have open: a file of its own, for those that serve without torch."""

import resource


def allow_open_files() -> int:
    """Raises this process's limit of open files as far as it goes, and says how far that is."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
