"""Memory that was freed, and that the C library keeps."""

import ctypes


def give_memory_back() -> None:
    """To the system; takes about a millisecond, in which other threads run.

    glibc keeps what each thread has freed, for as many threads as there were at once, and so a
    process grows for minutes with the threads that happen to read adapters side by side.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
