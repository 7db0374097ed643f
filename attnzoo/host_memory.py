"""How a process on a CPU keeps its memory between computations."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed() -> bool:
    """From now on, memory that is freed stays with this process for the next computation; returns whether that was arranged.

    XLA allocates the buffers of a program on the CPU when it runs, and glibc gives large ones back to the system when they are
    freed: at the next step every page is mapped and cleared again, up to a quarter of a training step. Only for processes of
    our own, of which one computation is much like the next: the command line and the tests. Does nothing where there is no
    glibc, or where the environment says how malloc is to behave.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
