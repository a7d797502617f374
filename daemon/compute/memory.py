"""Keeps the resident size near what is in use, without paying for fresh pages again and again."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # <malloc.h>
MMAP_BYTES = 10_000_000  # above most matrices of 100M parameters; what is larger comes and goes
KEEP_BYTES = 1 << 30

_library = ctypes.CDLL(None)


def reuse_freed_memory() -> None:
    """Lets all threads share one pool of freed blocks that stays resident, where the C library is glibc.

    By default each thread has a pool of its own, which on an 87M-parameter model holds 60 MB more at the peak; and what
    goes back to the system comes back as fresh pages, whose zeroing cost a fifth of an arrival's time.
    """
    if hasattr(_library, "mallopt"):
        _library.mallopt(M_ARENA_MAX, 1)
        _library.mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
        _library.mallopt(M_TRIM_THRESHOLD, KEEP_BYTES)


def return_freed_memory() -> None:
    """Gives the pool back to the system: nothing is in hand."""
    if hasattr(_library, "malloc_trim"):
        _library.malloc_trim(0)
