# SPDX-License-Identifier: Apache-2.0
"""The number of CPU threads of tenp's own pool. Results never depend on it."""

from tenp import _C


def num_threads() -> int:
    """Return the number of threads that CPU ops use.

    The default is the environment variable `TENP_NUM_THREADS`, else the number of processors that
    the process may run on.

    Example:
        >>> num_threads() >= 1
        True
    """
    return _C.num_threads()


def set_num_threads(count: int) -> None:
    """Set the number of threads that CPU ops use, in the whole process.

    Args:
        count: At least 1. The calling thread is one of them.

    Raises:
        InvalidArgument: `count` is below 1.

    Example:
        >>> before = num_threads()
        >>> set_num_threads(1)
        >>> num_threads()
        1
        >>> set_num_threads(before)
    """
    _C.set_num_threads(count)
